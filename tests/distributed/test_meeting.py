"""How processes meet and what they tell each other; whole runs are in test_whole_runs.py."""

import socket
import threading
import time
import types
from typing import Any

import numpy as np
import pytest

from fmbench.distributed import meeting
from fmbench.distributed.meeting import Place
from fmbench.distributed.team import Team
from fmbench.errors import UserError
from fmbench.system import load, timing
from fmbench.system.suspension import Watch


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def in_threads(*functions) -> list[Any]:
    """What each function returns, or raises."""
    results: list[Any] = [None] * len(functions)

    def call(index):
        try:
            results[index] = functions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return results


def meet(address, index, size, timeout=5.0):
    return meeting._meet(address, index, size, timeout, time.monotonic() + timeout)


def meet_all(size):
    address = free_address()
    met = in_threads(*(lambda index=index: meet(address, index, size) for index in range(size)))
    assert len({port for _, port in met}) == 1
    return [team for team, _ in met]


def test_processes_tell_each_other_in_their_order():
    teams = meet_all(3)
    assert [team.is_first for team in teams] == [True, False, False]
    for _ in range(100):
        gathered = in_threads(*(lambda team=team: team.gather(10 * team.index) for team in teams))
        assert gathered == [[0, 10, 20]] * 3
    called = iter("xy")
    assert in_threads(*(lambda team=team: team.from_first(called.__next__) for team in teams)) == ["x"] * 3
    assert next(called) == "y"
    for team in teams:
        team.say_goodbye()


def test_arrays_come_to_the_bit():
    arrays: list[np.ndarray] = [
        np.array([-0.0, np.nan, 1e-45], np.float32),
        np.array(7, np.int32),
        np.zeros((0, 3), np.uint8),
    ]
    first, second = meet_all(2)
    _, got = in_threads(
        lambda: first.arrays_of_first(arrays),
        lambda: second.arrays_of_first([np.ones_like(array) for array in arrays]),
    )
    assert [(x.dtype, x.shape, x.tobytes()) for x in got] == [(x.dtype, x.shape, x.tobytes()) for x in arrays]
    first.say_goodbye(), second.say_goodbye()


def test_a_process_alone_asks_nobody():
    team = Team()
    assert (team.gather(1), team.from_first(lambda: 2), team.arrays_of_first([np.ones(1)])) == (
        [1],
        2,
        [np.ones(1)],
    )
    team.require_equal({"a": "b"})


def test_a_difference_is_named_on_all():
    teams = meet_all(3)
    errors = in_threads(
        *(
            lambda team=team: team.require_equal({"x": "1", "jax": "0.12" if team.index < 2 else "0.11"})
            for team in teams
        )
    )
    assert {str(error) for error in errors} == {
        "process 2 differs from process 0 in jax: 0.11 instead of 0.12; start all with the same config, code and "
        "libraries."
    }
    for team in teams:
        team.say_goodbye()


@pytest.mark.parametrize(
    ("processes", "messages"),
    [
        ([(1, 2)], ["found no process 0 at"]),
        (
            [(0, 3), (1, 3)],
            ["did not come to .* within 1 s: 2;", "did not come to|its other processes have not come"],
        ),
        ([(0, 3), (1, 3), (1, 3)], ["two processes have --process_id=1"] * 3),
        ([(0, 2), (0, 2)], ["did not come|cannot listen there .*another one"] * 2),
        ([(0, 2), (1, 3)], ["process 0 has --num_processes=2, process 1 has 3"] * 2),
    ],
    ids=["nobody there", "one never comes", "one number twice", "two firsts", "sizes differ"],
)
def test_who_does_not_meet_is_told_in_time(processes, messages):
    address, start = free_address(), time.monotonic()
    errors = in_threads(*(lambda who=who: meet(address, who[0], who[1], timeout=1.0) for who in processes))
    assert time.monotonic() - start < 3
    for error, message in zip(errors, messages, strict=True):
        with pytest.raises(UserError, match=message):
            raise error


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"{}\n", b"[" * 1999 + b"\n"])
def test_somebody_else_at_the_address_is_no_process_0(says):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        server.settimeout(0.1)

        def answer():
            end = time.monotonic() + 2
            while time.monotonic() < end:
                try:
                    connection, _ = server.accept()
                    connection.sendall(says)
                except OSError:
                    pass

        error, _ = in_threads(lambda: meet(address, 1, 2, timeout=1.0), answer)
    assert isinstance(error, UserError)
    assert "does not answer as fmbench does" in str(error)


def test_process_0_minds_nobody_else():
    address = free_address()

    def knock():
        for says in (b"GET / HTTP/1.1\r\n\r\n", b"7\n", b""):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
                        connection.sendall(says)
                    break
                except OSError:
                    time.sleep(0.05)
        return meet(address, 1, 2)

    (first, _), (second, _) = in_threads(lambda: meet(address, 0, 2), knock)
    assert in_threads(lambda: first.gather(1), lambda: second.gather(2)) == [[1, 2]] * 2
    first.say_goodbye(), second.say_goodbye()


@pytest.fixture
def set_variables(monkeypatch):
    """Sets these variables, and of others that say a place none."""
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for _, name in meeting.FLAGS.values():
        monkeypatch.delenv(name, raising=False)

    def set_variables(address="", num_processes="", process_id=""):
        values = (address, num_processes, process_id)
        for (_, name), value in zip(meeting.FLAGS.values(), values, strict=True):
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            (None, None, None),
            "give --coordinator_address, --num_processes, --process_id, or set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES, JAX_PROCESS_ID\\.",
        ),
        (("here:1", 2, None), "give --process_id, or set JAX_PROCESS_ID\\."),
        (("here", 2, 0), "no host:port"),
        (("here:0", 2, 0), "no host:port"),
        (("here:99999", 2, 0), "no host:port"),
        (("here:1", 2, 2), "--process_id=2 is none of 0 to 1"),
        (("here:1", 0, 0), "--process_id=0 is none of"),
    ],
)
def test_a_place_that_is_none_is_refused(set_variables, place, message):
    with pytest.raises(UserError, match=message):
        meeting._find(Place(place[0], place[1], place[2], 1.0))


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ((None, None, None), ("there:2", 1, 3)),
        (("here:1", None, 0), ("here:1", 0, 3)),
        ((None, 2, None), ("there:2", 1, 2)),
    ],
)
def test_variables_say_what_flags_do_not(set_variables, place, found):
    set_variables("there:2", "3", "1")
    assert meeting._find(Place(place[0], place[1], place[2], 1.0))[:3] == found


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            ("there:2", "two", "0"),
            "^JAX_NUM_PROCESSES=two is no whole number from 0 on; .* give --num_processes",
        ),
        (("there:2", "2", "-1"), "^JAX_PROCESS_ID=-1 is no whole number"),
        (("there:2", "2", "2"), "^JAX_PROCESS_ID=2 is none of 0 to 1, with JAX_NUM_PROCESSES=2"),
        (("there", "2", "0"), "^JAX_COORDINATOR_ADDRESS=there is no host:port"),
        (("there:2", "", "0"), "give --num_processes, or set JAX_NUM_PROCESSES"),
    ],
)
def test_a_variable_that_is_no_place_is_named(set_variables, variables, message):
    set_variables(*variables)
    with pytest.raises(UserError, match=message):
        meeting._find(Place(None, None, None, 1.0))


def test_slurm_says_the_place(set_variables, monkeypatch):
    variables = {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": "node[3-6]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "4",
        "SLURM_STEP_NUM_TASKS": "4",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    address, index, size, _ = meeting._find(Place(None, None, None, 1.0))
    assert (address.partition(":")[0], index, size) == ("node3", 2, 4)


def test_times_are_of_all_and_core_seconds_are_sums(monkeypatch):
    teams = meet_all(2)
    fake_time = types.SimpleNamespace(process_time=iter([1.0, 1.0, 4.0, 4.0]).__next__)

    def run(team, seconds):
        stopwatch = timing.Stopwatch(Watch(), team.gather)
        with stopwatch("train") as lap:
            time.sleep(seconds)
        return lap, stopwatch.to_json()

    monkeypatch.setattr(timing, "time", fake_time)
    (lap, first), (_, second) = in_threads(lambda: run(teams[0], 0.0), lambda: run(teams[1], 0.3))
    assert lap.seconds > 0.25  # until the last one ended
    assert lap.core_seconds == 6.0
    assert first["core_seconds"] == second["core_seconds"] == {"train": 6.0}
    for team in teams:
        team.say_goodbye()


def test_the_load_of_several_processes_is_the_most_and_the_sum_of_switches():
    loads = [load.Load(1.0, None, 0.5, 3), load.Load(2.0, 4.0, 0.25, 4)]
    assert load.of_processes(loads) == load.Load(2.0, 4.0, 0.5, 7)
