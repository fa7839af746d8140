"""What Linux's control groups let this process have of the processors, as containers do."""

import contextlib
import math
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


def usable_cores() -> int:
    """Cores that threads of this process can keep busy: those it may run on, of which its quota may pay for fewer.

    A part of a core counts as one, as it does for the JVM (`os::active_processor_count`) and for Go (GOMAXPROCS):
    under a quota of 1.5, two threads that are stopped a quarter of the time do more than one that never is.
    """
    # macOS only tells how many there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, math.ceil(cpu_quota() or cores))


@contextlib.contextmanager
def threads_within_quota(*variables: str) -> Iterator[None]:
    """Has what is loaded meanwhile make `usable_cores` threads, where the quota says fewer than it would count.

    Args:
        variables: Of the environment, by which it lets itself be told. The first is set for as long as this lasts,
            unless somebody has set one of them.
    """
    if cpu_quota() is None or any(name in os.environ for name in variables):
        yield
        return
    os.environ[variables[0]] = str(usable_cores())
    try:
        yield
    finally:
        del os.environ[variables[0]]


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
            root = MOUNTED / controllers  # without any in version 2
            if controllers and not root.exists():  # mounted under one of their names
                root = MOUNTED / "cpu"
            inner = root / path.lstrip("/")
            yield from [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
