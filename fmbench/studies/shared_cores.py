"""Several runs at a time on one machine, each on cores of its own.

What sets the number of threads reads the cores that a process may run on: XLA, oneDNN's OpenMP, BLAS. So each
process is started by a thread that is held to its cores, and needs no further setting. Caches, memory and the
clock are shared all the same: the records say so, and their times are no timings.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fmbench.errors import UserError
from fmbench.records import machine
from fmbench.studies.suites import Run
from fmbench.system import cgroup, interrupt

BINDING = ("GOMP_CPU_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")  # would take threads to other runs' cores
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def split_cores(jobs: int) -> list[list[int]]:
    """The cores of each of `jobs` runs, as many for all: records of unlike numbers of cores make no row.

    The hyperthreads of a core stay together.

    Raises:
        UserError: If there are not as many.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(
            "runs at a time are pinned to cores, which this system cannot; train one by one, without --jobs."
        )
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (_first_sibling(core), core))
    usable = cores[: cgroup.usable_cores()]
    if not 1 <= jobs <= len(usable):
        raise UserError(f"--jobs={jobs}: a run needs a core of its own, and there are {len(usable)} here.")
    each = len(usable) // jobs
    return [usable[each * job : each * (job + 1)] for job in range(jobs)]


def _first_sibling(core: int) -> int:
    try:
        return int(Path(SIBLINGS.format(core)).read_text(encoding="utf-8").replace("-", ",").partition(",")[0])
    except (OSError, ValueError):
        return core


def environment(jobs: int) -> dict[str, str]:
    """The variables of one of `jobs` processes at a time."""
    variables = {name: value for name, value in os.environ.items() if name not in BINDING}
    variables.setdefault("JAX_PLATFORMS", "cpu")  # of which each has its own
    variables["PYTHONUNBUFFERED"] = "1"  # its lines are to be seen as they come
    return variables | ({machine.SHARED_BY: str(jobs)} if jobs > 1 else {})


class Pool:
    """The runs of a suite, some at a time.

    Attributes:
        failed: The exit statuses of those that failed, by name.
    """

    def __init__(
        self, runs: Sequence[Run], cores: Sequence[Sequence[int]], results_dir: Path, *, force: bool
    ) -> None:
        """Takes the cores of each run at a time."""
        self.failed: dict[str, int] = {}
        self._cores = cores
        self._flags = [f"--results_dir={results_dir}", *(["--force"] if force else [])]
        self._waiting: queue.SimpleQueue[tuple[int, Run]] = queue.SimpleQueue()
        for item in enumerate(runs, 1):
            self._waiting.put(item)
        self._num_runs = len(runs)
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()  # of _running, and of standard output
        self._signum = 0

    def train(self) -> None:
        """Trains them all.

        Raises:
            KeyboardInterrupt: On Ctrl-C and SIGTERM, when all that ran have saved a checkpoint.
        """
        threads = [threading.Thread(target=self._work, args=(cores,), daemon=True) for cores in self._cores]
        handlers = {signal.SIGINT: self._stop, signal.SIGTERM: self._stop, signal.SIGHUP: self._stop}
        handlers |= {signal.SIGTSTP: self._pause} if hasattr(signal, "SIGTSTP") else {}
        previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # a lock would let no signal through
                    time.sleep(0.1)
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if self._signum:
            raise KeyboardInterrupt if self._signum == signal.SIGINT else interrupt.Terminated

    def _work(self, cores: Sequence[int]) -> None:
        """One run after another, on these cores."""
        os.sched_setaffinity(0, cores)  # of this thread, and of the processes that it starts
        while not self._signum:
            try:
                number, run = self._waiting.get_nowait()
            except queue.Empty:
                return
            self._say(run, f"[{number}/{self._num_runs}] on cores {', '.join(map(str, cores))}")
            status = self._train(run)
            if status and not self._signum:
                self.failed[run.name] = status
                self._say(run, f"failed with exit status {status}; the others go on.")

    def _train(self, run: Run) -> int:
        command = [sys.executable, "-m", "fmbench.main", *run.flags, *self._flags]
        with self._lock:
            if self._signum:
                return 0
            process = subprocess.Popen(
                command,
                env=environment(len(self._cores)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="backslashreplace",
                process_group=0,  # so that a signal to this process's group reaches it once, through `_stop`
            )
            self._running[run.name] = process
        if self._signum:  # it came while the process was started
            os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout
        for line in process.stdout:
            self._say(run, line.rstrip("\n"))
        status = process.wait()
        with self._lock:
            del self._running[run.name]
        return status

    def _say(self, run: Run, line: str) -> None:
        with self._lock:
            print(f"{run.name} | {line}", flush=True)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Passes the signal on; it goes to each once, and a second one to all again."""
        is_first = not self._signum
        self._signum = signum
        if is_first:
            print("Stopping; each run saves a checkpoint first.", file=sys.stderr, flush=True)
        self._signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def _pause(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-Z, and what follows `fg`."""
        self._signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal(signal.SIGCONT)

    def _signal(self, signum: int) -> None:
        # Without the lock: this runs in a signal handler.
        for process in list(self._running.values()):
            if process.poll() is None:
                os.killpg(process.pid, signum)
