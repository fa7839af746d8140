"""What NVIDIA's driver says of the GPUs: their names, slices, memory and clocks."""

import contextlib
import functools
import os
import re
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

TIMEOUT = 10.0  # seconds that nvidia-smi may take
# All drivers that JAX runs on know these fields; of one that is unknown, nvidia-smi would refuse the whole query.
FIELDS = (
    "index",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
)


class Gpu(NamedTuple):
    """A GPU, or a slice of one (MIG)."""

    number: str  # of the GPU, as nvidia-smi counts
    name: str
    uuid: str
    mig_profile: str | None = None  # 1g.10gb
    mig_uuid: str = ""

    @property
    def kind(self) -> str:
        """What CUDA, and so JAX, calls it."""
        return f"{self.name} MIG {self.mig_profile}" if self.mig_profile else self.name


def find_gpus(kinds: Sequence[str]) -> list[Gpu | None]:
    """The GPUs behind JAX's devices, by their kinds and CUDA_VISIBLE_DEVICES; None where that is not known.

    CUDA counts the fastest first and nvidia-smi as they sit on the bus: of several that are alike it remains open
    which is which.
    """
    left = _visible(_list_gpus())
    found: list[Gpu | None] = []
    for kind in kinds:
        same = [gpu for gpu in left if gpu.kind == kind] or [gpu for gpu in left if gpu.name == kind]
        found.append(same[0] if same else None)
        left = [gpu for gpu in left if gpu is not found[-1]]
    return found


class Readings:
    """What nvidia-smi reads off all GPUs at this moment, each as a whole."""

    def __init__(self) -> None:
        lines = _nvidia_smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
        rows = [[value.strip() for value in line.split(",")] for line in lines]
        self._rows = {row[0]: dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS)}

    @property
    def driver(self) -> str | None:
        """The driver's version."""
        versions = [row["driver_version"] for row in self._rows.values()]
        return versions[0] if versions and not versions[0].startswith("[") else None

    def number(self, gpu: Gpu | None, field: str) -> float | None:
        """The value of a field in nvidia-smi's unit: MHz, MiB, W; None for [N/A], [Not Supported] and the like."""
        if gpu and gpu.number in self._rows:
            with contextlib.suppress(ValueError):
                return float(self._rows[gpu.number][field])
        return None


@functools.cache
def _list_gpus() -> list[Gpu]:
    """The machine's GPUs, or in the place of one that is cut up its slices."""
    gpus: list[Gpu] = []
    for line in _nvidia_smi("-L"):
        if whole := re.match(r"GPU (\d+): (.*) \(UUID: ([^)]+)\)", line):
            gpus.append(Gpu(*whole.groups()))
        elif gpus and (part := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: ([^)]+)\)", line)):
            gpu = gpus[-1] if gpus[-1].mig_profile else gpus.pop()
            gpus.append(gpu._replace(mig_profile=part[1], mig_uuid=part[2]))
    return gpus


def _visible(gpus: list[Gpu]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, in its order; of a GPU in slices the first, as CUDA has it."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return gpus
    first_slices = list({gpu.number: gpu for gpu in reversed(gpus)}.values())
    chosen = []
    for word in asked.split(","):
        chosen += [gpu for gpu in first_slices if gpu.number == word or (word and gpu.uuid.startswith(word))]
        chosen += [gpu for gpu in gpus if word and gpu.mig_uuid.startswith(word)]
    return chosen


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines it prints; none, if there is no such program, or it fails, or takes too long."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    return done.stdout.splitlines()
