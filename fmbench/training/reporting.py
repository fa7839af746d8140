"""What a run tells while it goes: a bar and lines to people, JSON lines and TensorBoard events to programs."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from fmbench.distributed import team
from fmbench.records.schema import Epoch
from fmbench.system import files

SECONDS_BETWEEN_UPDATES = 0.5


class Progress:
    """Loss, accuracy, images per second and time left, on standard error: of several processes by the first."""

    def __init__(self, *, num_steps: int, first_step: int, batch_size: int):
        self.batch_size = batch_size
        self.speaks = team.present().is_first
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self.speaks and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.last_update, self.last_step = time.perf_counter(), first_step
        self.watched = ""  # the last watched accuracies, as words

    def is_due(self) -> bool:
        """Whether it is time to look at a metric again: never more than twice a second."""
        return time.perf_counter() - self.last_update > SECONDS_BETWEEN_UPDATES

    def update(self, step: int, epoch: int, metrics: Mapping[str, jax.Array]) -> None:
        """Shows the metrics of a step that the device has finished."""
        now = time.perf_counter()
        speed = (step - self.last_step) * self.batch_size / (now - self.last_update)
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(
            f"loss {np.mean(metrics['loss']):.4f}, accuracy {np.mean(metrics['accuracy']):.2%}, "
            f"{speed:,.0f} img/s{self.watched}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        self.last_update, self.last_step = now, step

    def end_epoch(self, step: int, line: str, watched: str) -> None:
        """Prints an epoch's line, and keeps in the bar what the watched split gave: ', val accuracy 90.12%'."""
        self.watched = watched
        self.bar.update(step - self.bar.n)
        self.line(line)

    def line(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self.speaks:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self.bar.close()


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
    """Appends measurements to <workdir>/metrics.jsonl and <workdir>/tensorboard.

    Args:
        workdir: The run's work directory; made if absent.
        history: What was written up to where the run resumes. metrics.jsonl begins with it, whatever the file
            holds: lines of steps that come again, a line cut short, damage.

    Raises:
        OSError: As `write`, if there is no room.
    """

    def __init__(self, workdir: Path, history: Sequence[Mapping[str, float]]):
        files.make_folder(workdir)
        path = workdir / "metrics.jsonl"
        files.remove(path)
        _write_history(path, history)
        self._file = path.open("a", buffering=1)
        # Not tensorboardX.SummaryWriter, whose thread prints a traceback where a disk is full, and then hangs.
        files.make_folder(workdir / "tensorboard")
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        # TensorBoard forgets what an earlier process wrote beyond.
        next_step = int(history[-1]["step"]) + 1 if history else 1
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=next_step, session_log=start))

    def write(self, step: int, **scalars: float) -> None:
        """Writes {"step": step, name: value, ...}."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Returns when all is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._events.close()
