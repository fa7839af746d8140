"""Time in which this process lay still: stopped by a signal, frozen in a container, or with the machine asleep."""

import contextlib
import os
import threading
import time
from collections.abc import Callable

BEAT = 0.5  # seconds between looks
LEAST = 2.0  # seconds without a look that say: it lay still


class Watch:
    """In its `with` block looks at the clocks twice a second, from a thread that does nothing else.

    A process that is stopped (SIGSTOP, Ctrl-Z, a debugger, a frozen container) uses no processor time while the
    monotonic clock goes on; a machine that sleeps stops that clock, too, on Linux, where another one goes on.

    Args:
        at_beat: Called at every look.
    """

    def __init__(self, at_beat: Callable[[], None] = lambda: None):
        self._at_beat = at_beat
        self._lock = threading.Lock()
        self._looked, self._processor = time.perf_counter(), time.process_time()
        self._machine_slept = _clock_of_sleep()
        self._stopped = self._asleep = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look_often, name="fmbench-watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def awake(self) -> float:
        """The monotonic clock without the time in which this lay still, in seconds."""
        return self._look()[0]

    def asleep_seconds(self) -> float:
        """The time since this was made in which it lay still or the machine slept."""
        return self._look()[1]

    def _look(self) -> tuple[float, float]:
        """What `awake` and `asleep_seconds` return."""
        with self._lock:
            now, processor, slept = time.perf_counter(), time.process_time(), _clock_of_sleep()
            gap, used = now - self._looked, processor - self._processor
            self._looked, self._processor = now, processor
            # Until the next look was due it may have computed on all cores; after that, if stopped, not at all.
            if gap > LEAST and used < BEAT * (os.cpu_count() or 1) + (gap - BEAT) / 2:
                self._stopped += gap - BEAT
            if slept - self._machine_slept > LEAST:
                self._asleep += slept - self._machine_slept
                self._machine_slept = slept
            return now - self._stopped, self._stopped + self._asleep

    def _look_often(self) -> None:
        while not self._ending.wait(BEAT):
            self._look()
            with contextlib.suppress(OSError):  # a full disk is told by whoever needs it
                self._at_beat()


def _clock_of_sleep() -> float:
    """Seconds that the machine has slept since it was started; 0 where nobody tells."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
