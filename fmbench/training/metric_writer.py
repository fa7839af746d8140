"""One JSON line per measurement, and TensorBoard events."""

import json
from pathlib import Path

import tensorboardX

from fmbench.system.files import atomic_file


class MetricWriter:
    """Appends measurements to <workdir>/metrics.jsonl and <workdir>/tensorboard.

    Args:
        workdir: The run's work directory.
        first_step: Where the run resumes. Lines beyond it, written after the checkpoint and before a crash, are
            dropped: their steps come again.
    """

    def __init__(self, workdir: Path, first_step: int):
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
