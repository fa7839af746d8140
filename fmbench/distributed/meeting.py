"""How processes meet that are to train together, and how they end.

They meet at a socket of process 0 before JAX's own service is started, which answers a process that comes in vain,
or another one's end, by aborting with pages of C++, and cannot tell a wrong config from another. The connections
stay open to the end: over them goes what the processes have to agree on, and that one of them is gone.
"""

import contextlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from fmbench.distributed import team as teams
from fmbench.distributed.streams import filtered_streams
from fmbench.distributed.team import Team
from fmbench.errors import UserError
from fmbench.system import command_line

# JAX is imported in the functions, for `filtered_streams` forks this process before it has threads.

HEARTBEAT_TIMEOUT = 50  # seconds after which JAX gives up a process that is there, and does nothing


class Place(NamedTuple):
    """Where processes meet, and which one this is; None is for variables to say (`FLAGS`) or for JAX to find."""

    address: str | None  # host:port of process 0
    num_processes: int | None
    process_id: int | None
    timeout: float  # seconds


# What says a field of `Place`: the flag, or else the variable, of which JAX itself reads the first alone.
FLAGS = {
    "address": ("--coordinator_address", "JAX_COORDINATOR_ADDRESS"),
    "num_processes": ("--num_processes", "JAX_NUM_PROCESSES"),
    "process_id": ("--process_id", "JAX_PROCESS_ID"),
}


@contextlib.contextmanager
def joined(place: Place, identity: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Makes this process one of several, before it uses JAX; all reach the end of the `with` block, or none does.

    Args:
        place: Where they meet.
        identity: What must be equal in all of them, by name.

    If they do not meet, or are not equal, or an error ends one of them, all say so and end as commands do.
    """
    meeting = Team()
    with filtered_streams() as drain:
        try:
            from fmbench.system import runtime

            runtime.keep_freed_memory()  # the team has threads
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
            teams.set_present(meeting)
            yield
            meeting.gather(None)
            jax.distributed.shutdown()
            meeting.say_goodbye()
        except BaseException as error:
            _say_and_end(meeting.explain(error), drain)
        finally:
            teams.set_present(Team())


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

    place, said_by = _with_variables(place)
    found: tuple[Any, ...] = (place.address, place.num_processes, place.process_id, None)
    if None in found[:3]:
        try:
            seconds = max(1, round(place.timeout))
            found = ClusterEnv.auto_detect_unset_distributed_params(
                place.address, place.num_processes, place.process_id, None, None, seconds
            )
        except Exception as error:  # of many kinds: a variable that is missing, a server that is not there
            raise UserError(f"--distributed: what JAX finds of this cluster is of no use ({error!r}).") from error
    address, size, index, local_device_ids = found
    if missing := [
        pair for pair, value in zip(FLAGS.values(), (address, size, index), strict=True) if value is None
    ]:
        flags, variables = (", ".join(names) for names in zip(*missing, strict=True))
        raise UserError(
            "--distributed: JAX finds no SLURM, Open MPI, Kubernetes or Cloud TPU here; give "
            f"{flags}, or set {variables}."
        )
    if not re.fullmatch(r"\S+:\d+", address) or not 0 < int(address.rpartition(":")[2]) < 1 << 16:
        raise UserError(f"{said_by['address']}={address} is no host:port of process 0, such as 10.0.0.1:9876.")
    if not 0 <= index < size:
        raise UserError(
            f"{said_by['process_id']}={index} is none of 0 to {size - 1}, with {said_by['num_processes']}={size}."
        )
    return address, index, size, local_device_ids


def _with_variables(place: Place) -> tuple[Place, dict[str, str]]:
    """The place with what variables say of it, and for errors which flag or variable says each field."""
    said_by, fields = {}, place._asdict()
    for field, (flag, variable) in FLAGS.items():
        said_by[field] = flag
        if fields[field] is None and (value := os.environ.get(variable)):
            if field != "address" and not (value.isascii() and value.isdigit()):
                raise UserError(f"{variable}={value} is no whole number from 0 on; mend it, or give {flag}.")
            fields[field] = value if field == "address" else int(value)
            said_by[field] = variable
    return Place(**fields), said_by


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
    deadline -= min(2.0, timeout / 10)  # so that the others, who began to wait with it, hear what is missing
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
