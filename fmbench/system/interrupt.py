"""Ctrl-C and SIGTERM as a polite request."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """`signum` is the signal that asked the run to stop, or None."""

    def __init__(self) -> None:
        self.signum: int | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Notes SIGINT and SIGTERM for the training loop to see; a second one acts as it always did."""
    request = StopRequest()
    previous: dict[int, Any] = {}

    def note(signum: int, frame: object) -> None:
        request.signum = signum
        restore()

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
