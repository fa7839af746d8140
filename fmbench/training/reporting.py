"""What a run tells while it goes: a bar and lines to people, JSON lines and TensorBoard events to programs."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tensorboardX
from tqdm import tqdm

from fmbench.system.files import atomic_file

SECONDS_BETWEEN_UPDATES = 0.5


class Progress:
    """Loss, accuracy, images per second and time left, on standard error."""

    def __init__(self, *, num_steps: int, first_step: int, batch_size: int):
        self.batch_size = batch_size
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.last_update, self.last_step = time.perf_counter(), first_step

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
            f"{speed:,.0f} img/s",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)
        self.last_update, self.last_step = now, step

    def line(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        self.bar.close()


class MetricWriter:
    """Appends measurements to <workdir>/metrics.jsonl and <workdir>/tensorboard.

    Args:
        workdir: The run's work directory; made if absent.
        first_step: Where the run resumes. Lines beyond it, written after the checkpoint and before a crash, are
            dropped: their steps come again.
    """

    def __init__(self, workdir: Path, first_step: int):
        workdir.mkdir(exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                # A line cut short by a crash has no end.
                if line.endswith("\n") and json.loads(line)["step"] <= first_step:
                    kept.append(line)
        with atomic_file(path) as file:
            file.write("".join(kept).encode())
        self._file = path.open("a", buffering=1)
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1, write_to_disk=True
        )

    def write(self, step: int, **scalars: float) -> None:
        """Writes {"step": step, name: value, ...}."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
