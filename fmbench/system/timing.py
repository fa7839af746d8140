"""Where a run's time goes, in wall seconds and in core-seconds."""

import contextlib
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from fmbench.system import load as machine_load
from fmbench.system.suspension import Watch


@dataclasses.dataclass
class Lap:
    """The length of one timed block, known when it has ended."""

    seconds: float = 0.0
    core_seconds: float = 0.0
    gap: float = 0.0  # seconds from the end of the block of the same name before it; 0 for the first of a process
    load: machine_load.Load | None = None  # of the machine in the meantime
    asleep: float = 0.0  # seconds in the meantime, and in the gap, that are in neither: see `system.suspension`


class Stopwatch:
    """Adds up wall seconds and core-seconds under a name: setup, compile, train, eval, checkpoint.

    Core-seconds are the processor time of all threads of this process. A busy machine stretches them, too: others
    take a share of caches, of memory bandwidth, of a core's clock and of its second thread, and threads that wait
    for one without a core spin meanwhile. So the load is noted with every lap.

    Args:
        watch: Whose clock, without the time asleep, the seconds are of.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._asleep: dict[str, float] = {}  # at the end of the last lap of a name
        self.seconds: Counter[str] = Counter()
        self.core_seconds: Counter[str] = Counter()
        self._ended: dict[str, float] = {}
        self.first_step: float | None = None  # seconds from the start of this process to its first step's end

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Lap]:
        """Times a `with` block. Whoever starts device work in it waits for it in it."""
        lap = Lap()
        load_before = machine_load.read()
        start, core_start = self._watch.awake(), time.process_time()
        lap.gap = start - self._ended.get(name, start)
        asleep_before = self._asleep.get(name, self._watch.asleep_seconds())
        try:
            yield lap
        finally:
            self._ended[name] = self._watch.awake()
            self._asleep[name] = self._watch.asleep_seconds()
            lap.asleep = self._asleep[name] - asleep_before
            lap.seconds = self._ended[name] - start
            lap.core_seconds = time.process_time() - core_start
            self.add({name: lap.seconds}, {name: lap.core_seconds})
            lap.load = machine_load.between(load_before, machine_load.read())

    def to_json(self) -> dict[str, dict[str, float]]:
        """All seconds so far, as `add` takes them."""
        return {"seconds": dict(self.seconds), "core_seconds": dict(self.core_seconds)}

    def add(self, seconds: Mapping[str, float], core_seconds: Mapping[str, float]) -> None:
        """Adds what an earlier process measured."""
        self.seconds.update(seconds)
        self.core_seconds.update(core_seconds)


def seconds_since_process_start() -> float:
    """Wall seconds since the operating system started this process: imports and all.

    On Linux of a clock that nobody can set.
    """
    status = Path("/proc/self/stat")
    if status.exists():
        ticks = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[19])  # starttime, see proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.time() - psutil.Process().create_time())
