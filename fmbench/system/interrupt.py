"""Ctrl-C and SIGTERM: of a command the end, in one line; of a training run a polite request."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Terminated(KeyboardInterrupt):
    """SIGTERM, wherever Ctrl-C would raise KeyboardInterrupt."""


class Answer:
    """How this process, if it is a command of fmbench, answers the two signals.

    Where somebody waits for it, `expected`, by an exception; elsewhere, and while modules are imported, it ends at
    once: Python and libraries drop exceptions there ("Exception ignored in"), and the command would go on.
    """

    def __init__(self) -> None:
        self.listens = False
        self.expected = False
        self.given: KeyboardInterrupt | None = None  # which may be lost, or come out as another exception

    def listen(self) -> None:
        """Takes the signals over, unless they are ignored, as those of jobs in the background may be."""
        self.listens = True
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._answer)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._answer)
        sys.unraisablehook = self._notice

    def close(self) -> None:
        """Ignores them from now on: all is written, and what Python tears down would end in a traceback."""
        self.expected = False
        if self.listens:
            ignore()

    def _answer(self, signum: int, frame: FrameType | None) -> None:
        if not self.expected or _imports(frame):
            _end(signum)
        self.given = KeyboardInterrupt() if signum == signal.SIGINT else Terminated()
        raise self.given

    def _notice(self, unraisable: Any) -> None:
        """Ends the process where the exception came up in a callback or a finalizer, which can't pass it on."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _end(signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT)
        sys.__unraisablehook__(unraisable)


answer = Answer()


def exit_code(error: KeyboardInterrupt) -> int:
    """As shells have it: 130, or 143 on SIGTERM."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def in_words(error: KeyboardInterrupt, interrupted: str) -> str:
    """'interrupted; ...', or 'terminated; ...' on SIGTERM."""
    return interrupted.replace("interrupted", "terminated") if isinstance(error, Terminated) else interrupted


def _imports(frame: FrameType | None) -> bool:
    while frame:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _end(signum: int) -> NoReturn:
    """Says it and ends this process, without a word from whoever would clean up."""
    with contextlib.suppress(OSError):
        os.write(2, f"fmbench: {WORDS[signal.Signals(signum)]}.\n".encode())
    os._exit(128 + signum)


def ignore() -> None:
    """Ignores both signals in this process from now on."""
    for signum in WORDS:
        signal.signal(signum, signal.SIG_IGN)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Lets both signals wait. A process that is started meanwhile has them blocked until it unblocks them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WORDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """`signum` is the signal that asked the run to stop, or None."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.is_heeded = True  # else Ctrl-C acts as it always did: nobody looks at `signum` soon


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Notes SIGINT and SIGTERM for the training loop to see; a second one acts as it always did.

    Only the main thread has signals; in others nothing is noted.
    """
    request = StopRequest()
    previous: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        restore()
        if not request.is_heeded and callable(previous[signum]):
            previous[signum](signum, frame)
        request.signum = signum

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
