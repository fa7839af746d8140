"""What C++ says of processes that are gone, in one line."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from fmbench.distributed.team import GONE
from fmbench.system import interrupt

# What C++ says when another process is gone, and what it says in peace of nothing.
FATAL = re.compile(rb"Terminating process because the JAX distributed service")
NOISE = re.compile(
    rb"\[Gloo\]|[EWI]\d{4} .*(coordination_service|preemption_sync)|Additional GRPC|=== Source|external/xla\+|"
    rb"RPC: |\{|:UNKNOWN:|\s*$"
)


@contextlib.contextmanager
def filtered_streams() -> Iterator[Callable[[int], NoReturn]]:
    """Passes what C++ writes to standard output and error through a process of its own, which knows noise.

    When another process is gone, JAX aborts this one, with pages on standard error; of them, and of what else is
    said then, one line is left. Python's own streams are as they were.

    Yields:
        What ends this process with an exit code, when all is written.
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    kept = os.dup(1), os.dup(2)
    reader, writer = os.pipe()
    if not (child := os.fork()):
        _filter(reader, writer, kept[1])
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    options: dict[str, Any] = {"buffering": 1, "encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
    sys.stdout, sys.stderr = (open(descriptor, "w", **options) for descriptor in kept)  # noqa: SIM115, PTH123

    def drain(code: int) -> NoReturn:
        for stream in (sys.stdout, sys.stderr, *streams):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.close(1)
        os.close(2)
        os.waitpid(child, 0)
        os._exit(code)

    yield drain
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)
    os.waitpid(child, 0)
    sys.stdout, sys.stderr = streams
    for descriptor in kept:
        os.close(descriptor)


def _filter(reader: int, writer: int, out: int) -> None:
    """Copies lines until nobody writes any more; after the one that ends a command, none."""
    interrupt.ignore()
    os.close(writer)
    is_last = False
    with open(reader, "rb") as lines:
        for line in lines:
            if is_last or NOISE.match(line):
                continue
            if FATAL.search(line):
                line = f"fmbench.main: another process {GONE}.\n".encode()
            is_last = line.startswith(b"fmbench")
            with contextlib.suppress(OSError):
                os.write(out, line)
    os._exit(0)
