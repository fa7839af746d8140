"""Where a run's time goes, in wall seconds and in core-seconds."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import psutil

from fmbench.system import load as machine_load


@dataclasses.dataclass
class Lap:
    """The length of one timed block, known when it has ended."""

    seconds: float = 0.0
    core_seconds: float = 0.0
    gap: float = 0.0  # seconds from the end of the block of the same name before it; 0 for the first of a process
    load: machine_load.Load | None = None  # of the machine in the meantime


class Stopwatch:
    """Adds up wall seconds and core-seconds under a name: setup, compile, train, eval, checkpoint.

    Core-seconds are the processor time of all threads of this process. A busy machine stretches them, too: others
    take a share of caches, of memory bandwidth, of a core's clock and of its second thread, and threads that wait
    for one without a core spin meanwhile. So the load is noted with every lap.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.core_seconds: Counter[str] = Counter()
        self._ended: dict[str, float] = {}
        self.first_step: float | None = None  # seconds from the start of this process to its first step's end

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Lap]:
        """Times a `with` block. Whoever starts device work in it waits for it in it."""
        lap = Lap()
        load_before = machine_load.read()
        start, core_start = time.perf_counter(), time.process_time()
        lap.gap = start - self._ended.get(name, start)
        try:
            yield lap
        finally:
            self._ended[name] = time.perf_counter()
            lap.seconds = self._ended[name] - start
            lap.core_seconds = time.process_time() - core_start
            self.add({name: lap.seconds}, {name: lap.core_seconds})
            lap.load = machine_load.between(load_before, machine_load.read())

    def to_json(self, *, wall: float) -> dict[str, dict[str, float]]:
        """All seconds so far, as `add` takes them, and those of the whole run."""
        return {"seconds": {**self.seconds, "wall": wall}, "core_seconds": dict(self.core_seconds)}

    def add(self, seconds: Mapping[str, float], core_seconds: Mapping[str, float]) -> None:
        """Adds what an earlier process measured."""
        self.seconds.update(seconds)
        self.core_seconds.update(core_seconds)


def seconds_since_process_start() -> float:
    """Wall seconds since the operating system started this process: imports and all."""
    return time.time() - psutil.Process().create_time()
