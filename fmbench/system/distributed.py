"""Several processes that train together: how they meet, what they tell each other, and how they end together.

They meet at a socket of process 0 before JAX's own service is started, which answers a process that comes in vain,
or another one's end, by aborting with pages of C++, and cannot tell a wrong config from another. The connections
stay open to the end: over them goes what the processes have to agree on, and that one of them is gone.
"""

import base64
import contextlib
import json
import os
import queue
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fmbench.errors import UserError
from fmbench.system import command_line, interrupt

# JAX is imported in the functions, for `_filtered_streams` forks this process before it has threads.

HEARTBEAT_TIMEOUT = 50  # seconds after which JAX gives up a process that is there, and does nothing
GRACE = 20.0  # seconds that a process has to notice that another one is gone, by itself
PATIENCE = 3.0  # seconds for news of the others to arrive
GONE = (
    "has ended without a word: killed, perhaps, or its machine is gone; the same command goes on from the last "
    "checkpoint"
)

# What C++ says when another process is gone, and what it says in peace of nothing.
FATAL = re.compile(rb"Terminating process because the JAX distributed service")
NOISE = re.compile(
    rb"\[Gloo\]|[EWI]\d{4} .*(coordination_service|preemption_sync)|Additional GRPC|=== Source|external/xla\+|"
    rb"RPC: |\{|:UNKNOWN:|\s*$"
)


class Place(NamedTuple):
    """Where the processes meet, and which one this is; None is for JAX to find: SLURM, Open MPI, ..."""

    address: str | None  # host:port of process 0
    num_processes: int | None
    process_id: int | None
    timeout: float  # seconds


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


_team = Team()


def team() -> Team:
    """The processes of this run."""
    return _team


@contextlib.contextmanager
def joined(place: Place, identity: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Makes this process one of several, before it uses JAX; all reach the end of the `with` block, or none does.

    Args:
        place: Where they meet.
        identity: What must be equal in all of them, by name.

    If they do not meet, or are not equal, or an error ends one of them, all say so and end as commands do.
    """
    global _team
    meeting = Team()
    with _filtered_streams() as drain:
        try:
            address, index, size, local_device_ids = _find(place)
            deadline = time.monotonic() + place.timeout
            meeting, port = _meet(address, index, size, place.timeout, deadline)
            import jax

            meeting.require_equal(identity())
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(
                f"{address.rpartition(':')[0]}:{port}",
                size,
                index,
                local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=max(1, round(place.timeout)),
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                coordinator_bind_address=f"{_interface(address) or '[::]'}:{port}",
            )
            _team = meeting
            yield
            meeting.gather(None)
            jax.distributed.shutdown()
            meeting.say_goodbye()
        except BaseException as error:
            _say_and_end(meeting.explain(error), drain)
        finally:
            _team = Team()


def _say_and_end(error: BaseException, drain: Callable[[int], NoReturn]) -> NoReturn:
    """Ends this process as a command ends; Python's own way out would wait for threads that wait for others."""
    sys.stderr = sys.__stderr__  # the one line goes where C++'s pages would
    code: Any = 1
    try:
        with command_line.plain_errors("main"):
            raise error
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    drain(code)


def _find(place: Place) -> tuple[str, int, int, Sequence[int] | None]:
    """The address, this process's number, how many there are, and its devices where a scheduler deals them out."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks

    address = place.address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found: tuple[Any, ...] = (address, place.num_processes, place.process_id, None)
    if None in found[:3]:
        try:
            seconds = max(1, round(place.timeout))
            found = ClusterEnv.auto_detect_unset_distributed_params(
                address, place.num_processes, place.process_id, None, None, seconds
            )
        except Exception as error:  # of many kinds: a variable that is missing, a server that is not there
            raise UserError(f"--distributed: what JAX finds of this cluster is of no use ({error!r}).") from error
    address, size, index, local_device_ids = found
    flags = {"--coordinator_address": address, "--num_processes": size, "--process_id": index}
    if missing := [flag for flag, value in flags.items() if value is None]:
        raise UserError(
            "--distributed: JAX finds no SLURM, Open MPI, Kubernetes or Cloud TPU here; give "
            f"{', '.join(missing)}."
        )
    if not re.fullmatch(r"\S+:\d+", address) or not 0 < int(address.rpartition(":")[2]) < 1 << 16:
        raise UserError(f"--coordinator_address={address} is no host:port of process 0, such as 10.0.0.1:9876.")
    if not 0 <= index < size:
        raise UserError(f"--process_id={index} is none of 0 to {size - 1}, with --num_processes={size}.")
    return address, index, size, local_device_ids


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _interface(address: str) -> str:
    """The loopback interface, if the processes meet there: nobody else need come in. Or '', all of them."""
    with contextlib.suppress(OSError):
        resolved = socket.gethostbyname(_host(address))
        return resolved if resolved.startswith("127.") else ""
    return ""


def _meet(address: str, index: int, size: int, timeout: float, deadline: float) -> tuple[Team, int]:
    """Connects the processes; returns with them a free port of process 0's machine, for JAX."""
    team = Team(index, size)
    if index:
        connection, port = _come(address, index, size, timeout, deadline)
        team.add(connection, 0)
        return team, port
    with socket.socket() as probe:
        probe.bind((_interface(address), 0))
        port = probe.getsockname()[1]
    for other, connection in sorted(_receive_all(address, size, timeout, deadline, port).items()):
        team.add(connection, other)
    return team, port


def _receive_all(
    address: str, size: int, timeout: float, deadline: float, jax_port: int
) -> dict[int, socket.socket]:
    """Process 0 waits for the others, tells them that all have come, or all of them what is wrong."""
    come: dict[int, socket.socket] = {}
    refused: list[socket.socket] = []
    problem = ""
    interface = _interface(address)
    try:
        dual = not interface and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        port = int(address.rpartition(":")[2])
        server = socket.create_server((interface, port), family=family, backlog=size, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"--coordinator_address={address}: process 0 cannot listen there ({error.strerror}); is another one "
            "running?"
        ) from error
    with server:
        while len(come) < size - 1 and not problem:
            try:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(index) for index in range(1, size) if index not in come)
                problem = (
                    f"of {size} processes these did not come to {address} within {timeout:g} s: {missing}; start "
                    "all of them, or give a longer --timeout."
                )
                break
            hello = _hear(connection, 2.0)
            index, its_size = (
                hello.get(name) if isinstance(hello, dict) else None for name in ("fmbench", "size")
            )
            if not isinstance(index, int) or not isinstance(its_size, int):
                connection.close()  # somebody else
                continue
            if its_size != size:
                problem = f"process 0 has --num_processes={size}, process {index} has {its_size}."
            elif index in come:
                problem = f"two processes have --process_id={index}."
            else:
                come[index] = connection
                continue
            refused.append(connection)
    for connection in (*come.values(), *refused):
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"error": problem} if problem else {"port": jax_port}).encode() + b"\n")
    if problem:
        raise UserError(problem)
    return come


def _come(address: str, index: int, size: int, timeout: float, deadline: float) -> tuple[socket.socket, int]:
    """Another process finds process 0, and waits until all have come."""
    host, port = _host(address), int(address.rpartition(":")[2])
    why = "nobody listens"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=left)
            connection.sendall(json.dumps({"fmbench": index, "size": size}).encode() + b"\n")
            answer = _hear(connection, max(0.001, deadline - time.monotonic()))
        except OSError as error:
            why = error.strerror or "no answer"
            time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
            continue
        if isinstance(answer, dict) and "port" in answer:
            return connection, answer["port"]
        if isinstance(answer, dict) and "error" in answer:
            raise UserError(answer["error"])
        connection.close()
        why = "it does not answer as fmbench does, or its other processes have not come"
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    raise UserError(
        f"process {index} found no process 0 at --coordinator_address={address} within {timeout:g} s ({why}); "
        "start it, or name another address."
    )


def _hear(connection: socket.socket, seconds: float) -> Any:
    """A line of JSON from one who has just connected; None, if it says nothing of the kind."""
    end, said = time.monotonic() + seconds, b""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        while not said.endswith(b"\n") and len(said) < 2000:
            connection.settimeout(max(0.001, end - time.monotonic()))
            if not (byte := connection.recv(1)):  # what follows the line is for others
                return None
            said += byte
        return json.loads(said)
    return None


@contextlib.contextmanager
def _filtered_streams() -> Iterator[Callable[[int], NoReturn]]:
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
