"""An epoch's measurements, in <workdir>/metrics.jsonl and wherever else somebody looks at them."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmbench.records.schema import Epoch, RunRecord
from fmbench.reporting import tensorboard
from fmbench.reporting.names import tagged
from fmbench.reporting.trackers import Trackers
from fmbench.system import files

AT_THE_END = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")  # of the record


def mend_metrics(workdir: Path, history: Sequence[Epoch]) -> None:
    """Writes metrics.jsonl anew, and says so, where it is not a finished run's history."""
    path = workdir / "metrics.jsonl"
    try:
        lines = files.read_text(path).splitlines()
        if [Epoch(**json.loads(line)) for line in lines] == list(history):
            return
        damage = "is not the history that the record has"
    except (ValueError, TypeError, RecursionError):
        damage = "is damaged"
    print(f"{path}: {damage}; written anew.", file=sys.stderr)
    files.remove(path)
    _write_history(path, [epoch.model_dump(exclude_none=True) for epoch in history])


def _write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    with files.atomic_file(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in history).encode())


class MetricWriter:
    """Appends measurements to <workdir>/metrics.jsonl, and tells TensorBoard and the trackers of them.

    Args:
        workdir: The run's work directory; made if absent.
        history: What was written up to where the run resumes. metrics.jsonl begins with it, whatever the file
            holds: lines of steps that come again, a line cut short, damage.
        config: The run's, flat, for TensorBoard's table of hyperparameters.
        trackers: Who else is told.

    Raises:
        OSError: As `write`, if there is no room.
    """

    def __init__(
        self,
        workdir: Path,
        history: Sequence[Mapping[str, float]],
        config: Mapping[str, Any] | None = None,
        trackers: Trackers | None = None,
    ):
        files.make_folder(workdir)
        path = workdir / "metrics.jsonl"
        files.remove(path)
        _write_history(path, history)
        self._file = path.open("a", buffering=1)
        next_step = int(history[-1]["step"]) + 1 if history else 1
        self._events = tensorboard.Events(workdir / "tensorboard", next_step)
        if config:
            self._events.add_hyperparameters(config)
        self._trackers = trackers or Trackers()

    def write(self, step: int, **scalars: float) -> None:
        """Writes {"step": step, name: value, ...}; elsewhere the names are those of `names.tag`."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._events.add_scalars(step, tagged(scalars))
        self._trackers.write(step, tagged(scalars))

    def end(self, record: RunRecord, images: Mapping[str, np.ndarray]) -> None:
        """What is known at the run's end, for viewers alone: the last accuracies, and images, uint8 (h, w)."""
        last = record.history[-1].model_dump() if record.history else {}
        found = {name: getattr(record, name) for name in AT_THE_END if last.get(name) is None}
        scalars = tagged({name: value for name, value in found.items() if value is not None})
        self._events.add_scalars(record.num_steps, scalars)
        self._trackers.write(record.num_steps, scalars)
        for name, image in images.items():
            self._events.add_image(record.num_steps, name, image)
        if record.status != "interrupted":
            self._events.add_end(succeeded=record.status == "completed")

    def close(self) -> None:
        """Returns when all is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._events.close()
