"""What Linux's control groups let this process have of the processors, as containers do."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")


def cpu_quota() -> float | None:
    """Cores' worth of time that this process may use, by the tightest of its groups; None: all there are."""
    quotas = []
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000", microseconds
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:  # version 1 says -1
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def throttled_seconds() -> float:
    """Core-seconds that quotas have taken so far from what was ready to run in the groups of this process."""
    seconds = 0.0
    for folder in _folders():
        with contextlib.suppress(OSError):
            fields = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            seconds += int(fields.get("throttled_usec", 0)) / 1e6 + int(fields.get("throttled_time", 0)) / 1e9
    return seconds


def _folders() -> Iterator[Path]:
    """Those of the groups that this process is in, version 1 or 2, and of the groups around them."""
    with contextlib.suppress(OSError):
        for line in os.fsdecode(MEMBERSHIP.read_bytes()).splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = MOUNTED / "cpu" if controllers else MOUNTED
            inner = root / path.lstrip("/")
            yield from [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
