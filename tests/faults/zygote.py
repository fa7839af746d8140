"""A process that has imported fmbench and forks commands: a child takes milliseconds to start, not seconds.

Started by `children.Zygote`, which writes a request a line. No backend is initialised and no thread started here,
so that a child is what `python -m fmbench.<name>` is after its imports.
"""

import ctypes
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fmbench.system import command_line, interrupt

# What the commands import, and what they import late.
MODULES = (
    "fmbench.api",
    "fmbench.training.run",
    "fmbench.training.inference",
    "fmbench.pages.leaderboard",
    "fmbench.data.export",
    "fmbench.data.photos",
    "fmbench.pages.drawing",
    "fmbench.studies.verification",
    "sklearn.metrics",
    "sklearn.model_selection",
)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    if threading.active_count() > 1:
        raise RuntimeError(
            f"importing fmbench started threads, and forks would lose them: {threading.enumerate()}"
        )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until a child can answer them
    become(serve(socket.socket(fileno=int(sys.argv[1]))))


def serve(requests: socket.socket) -> dict[str, Any]:
    """Starts and reaps children as it is told; returns in a child only, with what to become."""
    with requests, requests.makefile("rw") as lines:
        for line in lines:
            request = json.loads(line)
            if "reap" in request:
                _, status, usage = os.wait4(request["reap"], 0)
                lines.write(f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}\n")
            elif pid := os.fork():
                lines.write(f"{pid}\n")
            else:
                return request
            lines.flush()
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Runs the command that `children.start` describes, as if Python had been started with it."""
    os.setsid()
    for number, (path, flags) in enumerate(zip(request["streams"], (os.O_RDONLY, *2 * [WRITE]), strict=True)):
        source = os.open(path, flags, 0o644)
        os.dup2(source, number)
        os.close(source)
    open_streams()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    restrict(request["limits"], request["obedient"])
    if request["small_data"]:
        take_sample_for_standard()
    if request["clock"]:
        set_clock(**request["clock"])
    if request["die"]:
        die_at_file_operation(**request["die"])
    sys.argv = [request["module"], *request["args"]]
    if request["module"].startswith("fmbench."):  # as `fmbench/__init__.py` does where a command begins
        interrupt.answer.listen()
        command_line.begin()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if request["module"].endswith(".py"):
        runpy.run_path(request["module"], run_name="__main__")
    else:
        sys.modules.pop(request["module"], None)
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def open_streams() -> None:
    """Makes Python's streams anew, as it does at its start under C.UTF-8: the old ones know of other files."""
    kept = {"stdin": "surrogateescape", "stdout": "surrogateescape", "stderr": "backslashreplace"}
    for number, (name, errors) in enumerate(kept.items()):
        mode, buffering = "w" if number else "r", 1 if name == "stderr" else -1
        stream = open(number, mode, buffering, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


WRITE = os.O_WRONLY | os.O_CREAT | os.O_APPEND
CAPABILITIES_V3 = 0x20080522  # linux/capability.h: three masks of 64 bits follow


def restrict(limits: dict[str, int], obedient: bool) -> None:
    """Sets limits, by their names in `resource`, that of memory beyond what is taken.

    Obedient is who gives up root's capabilities, and with them its passing over permissions (capset(2)). To become
    another user instead would need an installation that this one may read, wherever it lies.
    """
    for name, value in limits.items():
        if name == "RLIMIT_AS":
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (value, value))
    if obedient and ctypes.CDLL(None).capset(struct.pack("Ii", CAPABILITIES_V3, 0), bytes(24)) != 0:
        raise OSError("capset failed")


def take_sample_for_standard() -> None:
    """Lets the sample of 680 images pass for the whole data set: its way through the cache takes seconds."""
    from fmbench.data import proof

    proof.SHA256[proof.STANDARD] = proof.SHA256["sample"]


def set_clock(offset: float, later: float, when: str) -> None:
    """Sets the clock that Python tells by some seconds, and by others as soon as the file `when` is there."""
    seconds, nanoseconds, exists = time.time, time.time_ns, os.path.exists

    def step() -> float:
        return later if exists(when) else offset

    time.time = lambda: seconds() + step()
    time.time_ns = lambda: nanoseconds() + int(1e9 * step())


FILE_OPERATIONS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def die_at_file_operation(number: int, under: str) -> None:
    """Kills this process, with kill -9, when it is about to change files below `under` for the n-th time."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in FILE_OPERATIONS
        if changes and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(under):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    main()
