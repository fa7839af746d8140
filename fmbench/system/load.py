"""What else a machine does while this process computes on it."""

import os
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from fmbench.system import cgroup

PROC_STAT = Path("/proc/stat")


class Reading(NamedTuple):
    """The load now, and counts since some time in the past; None where the system does not tell."""

    load_average: float | None  # of the last minute: threads that run or could
    other_core_seconds: float | None  # of other processes, on the cores that this one may run on
    stolen_core_seconds: float | None  # by the host of this virtual machine, and by quotas
    involuntary_switches: int  # of this process's threads


class Load(NamedTuple):
    """What happened between two readings; fields as in `records.schema.Epoch`."""

    load_average: float | None
    other_core_seconds: float | None
    stolen_core_seconds: float | None
    involuntary_switches: int


def read() -> Reading:
    """Reads it; takes a tenth of a millisecond."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if not PROC_STAT.exists():
        return Reading(average, None, None, used.ru_nivcsw)
    times = psutil.cpu_times(percpu=True)
    cores = [times[core] for core in os.sched_getaffinity(0) if core < len(times)]
    busy = sum(core.user + core.nice + core.system + core.irq + core.softirq for core in cores)
    stolen = sum(core.steal for core in cores) + cgroup.throttled_seconds()
    return Reading(average, busy - used.ru_utime - used.ru_stime, stolen, used.ru_nivcsw)


def between(start: Reading, end: Reading) -> Load:
    """The mean load average of two readings, and what was counted from one to the other."""

    def difference(name: str) -> float | None:
        before, after = getattr(start, name), getattr(end, name)
        return None if before is None or after is None else max(0.0, after - before)

    averages = [reading.load_average for reading in (start, end) if reading.load_average is not None]
    return Load(
        sum(averages) / len(averages) if averages else None,
        difference("other_core_seconds"),
        difference("stolen_core_seconds"),
        end.involuntary_switches - start.involuntary_switches,
    )


def of_processes(loads: Sequence[Load]) -> Load:
    """Of processes of one run: the most that any of them found, and the sum of their switches."""

    def most(values: Iterable[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)

    averages, others, stolen, switches = zip(*loads, strict=True)
    return Load(most(averages), most(others), most(stolen), sum(switches))
