"""Commands of fmbench as processes: forked from a warm one, or started anew."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import zygote

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 90  # seconds; the longest command here takes some ten on a busy machine


class Result(NamedTuple):
    """How a command ended."""

    code: int | None  # None: it hung, and was killed
    out: str
    err: str
    memory: int  # bytes, at its most

    @property
    def last_line(self) -> str:
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Child:
    """A running command."""

    def __init__(self, pid: int, out: Path, err: Path, reap: Any):
        self.pid = pid
        self._out, self._err = out, err
        self._reap = reap
        self._handle: int | None = os.pidfd_open(pid)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self.kill()
            self.wait()

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle or -1, signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def is_running(self, wait: float = 0) -> bool:
        return not select.select([self._handle or -1], [], [], wait)[0]

    def wait(self, timeout: float = TIMEOUT) -> Result:
        """Waits for the end; what takes longer is killed with all that it started."""
        hung = self.is_running(timeout)
        if hung:
            self.send(signal.SIGCONT)
            self.kill()
        code, kilobytes = self._reap(self.pid)
        os.close(self._handle or -1)
        self._handle = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return Result(None if hung else code, self.out, self.err, 1024 * kilobytes)

    @property
    def out(self) -> str:
        return _read(self._out)

    @property
    def err(self) -> str:
        return _read(self._err)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


class Zygote:
    """See `zygote.py`."""

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        its.set_inheritable(True)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(zygote.__file__)), str(its.fileno())],
            pass_fds=[its.fileno()],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
        )
        its.close()
        self._requests = ours
        self._lines = ours.makefile("rw")

    def _ask(self, request: dict[str, Any]) -> list[int]:
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        return [int(word) for word in self._lines.readline().split()]

    def start(self, request: dict[str, Any]) -> int:
        return self._ask(request)[0]

    def reap(self, pid: int) -> tuple[int, int]:
        """Exit code, and kilobytes of memory."""
        code, kilobytes = self._ask({"reap": pid})
        return code, kilobytes

    def close(self) -> None:
        self._lines.close()
        self._requests.close()
        self._process.wait()


def start(
    warm: Zygote | None,
    folder: Path,
    module: str,
    *args: str,
    env: Mapping[str, str],
    limits: Mapping[str, int] | None = None,
    obedient: bool = False,
    die: dict[str, Any] | None = None,
    small_data: bool = False,
    clock: dict[str, Any] | None = None,
    stdin: str = os.devnull,
    stdout: str | None = None,
    prefix: tuple[str, ...] = (),
) -> Child:
    """Starts `python -m <module> <args>` in `folder`.

    Args:
        warm: Where to fork it; None starts it anew.
        folder: Its current one, and that of its output.
        module: Or the path of a script.
        env: All of its environment.
        limits: By their names in `resource`, like RLIMIT_FSIZE.
        obedient: Whether permissions bind it, even if it is root.
        die: Arguments of `zygote.die_at_file_operation`.
        small_data: Whether the sample passes for the whole data set.
        clock: Arguments of `zygote.set_clock`.
        stdin: File.
        stdout: File; None for one that can be read later.
        prefix: Words before Python's, if it is started anew.
    """
    out, err = folder / f"stdout-{time.monotonic_ns()}", folder / f"stderr-{time.monotonic_ns()}"
    if warm is not None:
        request = {
            "module": module,
            "args": args,
            "streams": [stdin, stdout or str(out), str(err)],
            "cwd": str(folder),
            "env": dict(env),
            "limits": dict(limits or {}),
            "obedient": obedient,
            "die": die,
            "small_data": small_data,
            "clock": clock,
        }
        return Child(warm.start(request), out, err, warm.reap)
    if limits or obedient or die or small_data or clock:
        raise ValueError("only forked commands can be limited, deceived, or made to die")
    with open(stdin, "rb") as source, open(stdout or out, "ab") as sink, err.open("ab") as complaints:  # noqa: PTH123
        process = subprocess.Popen(
            [*prefix, sys.executable, *(() if module.endswith(".py") else ("-m",)), module, *args],
            cwd=folder,
            env=dict(env),
            stdin=source,
            stdout=sink,
            stderr=complaints,
            start_new_session=True,
        )
    return Child(process.pid, out, err, _reap)


def _reap(pid: int) -> tuple[int, int]:
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss


@contextlib.contextmanager
def warm_process() -> Iterator[Zygote]:
    process = Zygote()
    try:
        yield process
    finally:
        process.close()
