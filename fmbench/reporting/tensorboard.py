"""Events for TensorBoard, which reads them with or without its own package being here."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import api_pb2, event_pb2, plugin_hparams_pb2, summary_pb2

from fmbench.system import files

CELL, MARGIN = 60, 110  # pixels of the confusion matrix
IMAGES_PER_ROW = 8


class Events:
    """A file of events in a folder, which may hold those of earlier processes."""

    def __init__(self, folder: Path, next_step: int) -> None:
        """`next_step` is the first that this process has: TensorBoard forgets what an earlier one wrote beyond."""
        files.make_folder(folder)
        # Not tensorboardX.SummaryWriter, whose thread prints a traceback where a disk is full, and then hangs.
        # Its names count seconds: an attempt within the same second would write over the file of the one before.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=next_step, session_log=start))

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._add(step, summary.scalar(tag, value))
        self._writer.flush()

    def add_image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Adds a picture, uint8 (height, width)."""
        self._add(step, summary.image(tag, image, dataformats="HW"))

    def add_hyperparameters(self, config: Mapping[str, Any]) -> None:
        """Adds the run to the table of hyperparameters, whose columns TensorBoard finds by looking at all runs."""
        start = plugin_hparams_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in config.items():
            kind = {bool: "bool_value", int: "number_value", float: "number_value"}.get(
                type(value), "string_value"
            )
            setattr(start.hparams[name], kind, str(value) if kind == "string_value" else value)
        self._add_to_table("session_start_info", session_start_info=start)

    def add_end(self, *, succeeded: bool) -> None:
        status = api_pb2.Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
        end = plugin_hparams_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        self._add_to_table("session_end_info", session_end_info=end)

    def close(self) -> None:
        self._writer.close()

    def _add_to_table(self, name: str, **info: Any) -> None:
        content = plugin_hparams_pb2.HParamsPluginData(version=0, **info).SerializeToString()
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        value = summary_pb2.Summary.Value(
            tag=f"_hparams_/{name}", metadata=summary_pb2.SummaryMetadata(plugin_data=plugin)
        )
        self._add(0, summary_pb2.Summary(value=[value]))

    def _add(self, step: int, content: Any) -> None:
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=content))


def grid(images: np.ndarray) -> np.ndarray:
    """Images, (n, 28, 28), as one picture, uint8 (height, width), eight a row, each pixel three wide."""
    padded = np.pad(images, ((0, -len(images) % IMAGES_PER_ROW), (1, 1), (1, 1)))
    _, height, width = padded.shape
    rows = padded.reshape(-1, IMAGES_PER_ROW, height, width).swapaxes(1, 2)
    return rows.reshape(-1, IMAGES_PER_ROW * width).repeat(3, axis=0).repeat(3, axis=1)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """How often each true class (row) was predicted as each class (column), in grey and in numbers.

    Args:
        labels: True classes, integers (n,).
        predictions: Predicted classes, integers (n,).
        class_names: In the order of the classes.

    Returns:
        A picture, uint8 (height, width).
    """
    size = len(class_names)
    counts = np.zeros((size, size), int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = MARGIN + size * CELL
    picture = Image.new("L", (side + 20, side), 255)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((8, 8), "true \\ predicted", 0, font)
    for row in range(size):
        middle = MARGIN + row * CELL + CELL // 2
        draw.text((MARGIN - 8, middle), class_names[row], 0, font, anchor="rm")
        draw.text((middle, MARGIN - 12 - 16 * (row % 2)), class_names[row], 0, font, anchor="ms")
        for column in range(size):
            left, top = MARGIN + column * CELL, MARGIN + row * CELL
            grey = round(255 * (1 - shares[row, column]))
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), grey)
            centre = (left + CELL // 2, top + CELL // 2)
            draw.text(centre, str(counts[row, column]), 255 if grey < 128 else 0, font, anchor="mm")
    return np.asarray(picture)
