"""What the processes of a run tell each other, and how each learns that another one is gone."""

import base64
import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fmbench.errors import UserError
from fmbench.system import interrupt

GRACE = 20.0  # seconds that a process has to notice that another one is gone, by itself
PATIENCE = 3.0  # seconds for news of the others to arrive
GONE = (
    "has ended without a word: killed, perhaps, or its machine is gone; the same command goes on from the last "
    "checkpoint"
)


class Team:
    """The processes of a run, of which this is one; mostly the only one."""

    def __init__(self, index: int = 0, size: int = 1):
        self.index, self.size = index, size
        self._links: list[_Link] = []  # of process 0 to all others in their order, of these to process 0
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._failure = ""

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which keeps the work directory, and speaks."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order; all call it at the same place, and wait for all.

        Raises:
            UserError: If another process has ended.
        """
        if self.size == 1:
            return [value]
        if not self.is_first:
            self._links[0].send({"value": value})
            return self._receive(self._links[0])
        values = [value, *(self._receive(link) for link in self._links)]
        for link in self._links:
            link.send({"value": values})
        return values

    def from_first(self, function: Callable[[], Any]) -> Any:
        """What `function` gives on process 0, which alone calls it, as JSON has it."""
        return self.gather(function() if self.is_first else None)[0]

    def arrays_of_first(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The arrays of process 0, to the bit; all give some of the same types and shapes."""
        if self.size == 1:
            return list(arrays)
        sent = self.from_first(lambda: [base64.b64encode(array.tobytes()).decode() for array in arrays])
        return [
            np.frombuffer(base64.b64decode(text), array.dtype).reshape(array.shape)
            for text, array in zip(sent, arrays, strict=True)
        ]

    def require_equal(self, what: Mapping[str, Any]) -> None:
        """Compares with the other processes, field by field.

        Raises:
            UserError: On all of them, if one differs from process 0.
        """
        first, *others = self.gather(dict(what))
        for index, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                if first.get(name) != other.get(name):
                    raise UserError(
                        f"process {index} differs from process 0 in {name}: {other.get(name)} instead of "
                        f"{first.get(name)}; start all with the same config, code and libraries."
                    )

    def add(self, connection: socket.socket, index: int) -> None:
        """Takes the connection to another process, in their order."""
        self._links.append(_Link(connection, index, self._lose))

    def say_goodbye(self) -> None:
        """Ends the connections when all is done."""
        for link in self._links:
            link.send({"bye": True})

    def explain(self, error: BaseException) -> BaseException:
        """What to tell the user of an error that ends this process; the others are told of it."""
        is_told = isinstance(error, UserError | KeyboardInterrupt)
        if not is_told and self._failed.wait(PATIENCE if self.size > 1 else 0):
            return UserError(self._failure)
        with self._lock:
            is_news = not self._failed.is_set()
            self._failed.set()
        if is_news:
            first_line, *_ = str(error).splitlines() or [""]
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {first_line}".strip()
            if isinstance(error, KeyboardInterrupt):
                text = f"{interrupt.in_words(error, 'interrupted')}."
            for link in self._links:
                link.send({"error": f"process {self.index}: {text}"})
            for link in self._links:  # before JAX's service, if it is here, takes them along
                link.ended.wait(PATIENCE)
        return error

    def _receive(self, link: "_Link") -> Any:
        value = link.inbox.get()
        if value is _Link.END:
            raise UserError(self._failure)
        return value

    def _lose(self, why: str) -> None:
        """Notes, on a thread, that another process has ended, and ends this one if it does not notice."""
        with self._lock:
            if self._failed.is_set():
                return
            self._failure = why
            self._failed.set()
        for link in self._links:
            link.inbox.put(_Link.END)
            if self.is_first:
                link.send({"error": why})
        time.sleep(GRACE)
        os.write(2, f"fmbench.main: {why}\n".encode())
        os._exit(2)


class _Link:
    """A connection to another process, which a thread reads: a JSON object a line."""

    END = object()

    def __init__(self, connection: socket.socket, peer: int, lose: Callable[[str], None]):
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine without power says nothing: it is given up after 25 seconds.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._connection, self._peer, self._lose = connection, peer, lose
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.ended = threading.Event()
        threading.Thread(target=self._read, name=f"fmbench-process-{peer}", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Sends it, if somebody is there; that nobody is, the thread says."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        why = f"process {self._peer} {GONE}."
        with contextlib.suppress(OSError, ValueError), self._connection.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "bye" in message:
                    self.ended.set()
                    return
                if "error" in message:
                    why = message["error"]
                    break
                self.inbox.put(message["value"])
        self.ended.set()
        self._lose(why)


_present = Team()


def present() -> Team:
    """The processes of this run."""
    return _present


def set_present(team: Team) -> None:
    """Says which they are."""
    global _present
    _present = team
