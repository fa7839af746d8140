"""What scaling is on this machine: an entry trained by 1, 2, 4, ... processes, each on one core, over loopback.

Process i has core i, and where there are more processes than cores, shares it. What predictions take as given, a
core's matrix products and gloo's all-reduces, is timed by processes of `python -m fmbench.studies.loopback`. Of
all-reduces and epochs the fastest counts, for others may have the cores meanwhile.
"""

import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmbench.distributed import meeting
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.studies.compiled_step import CompiledStep
from fmbench.system import load
from fmbench.system.peers import last_line

REPETITIONS = 100  # of each all-reduce
CALIBRATIONS = 3


class Measurement(NamedTuple):
    """A training, by processes of a core each, and what was predicted of its step."""

    step: CompiledStep
    step_seconds: float  # mean of the fastest epoch
    core_seconds: float  # of a step, over all processes; of the epoch with the fewest
    all_reduce_seconds: float  # of all collectives of a step, timed alone
    compute_seconds: float  # predicted, by the single process's utilisation; of each, were the cores its own
    others_share: float | None  # of the machine's cores, that other processes had meanwhile


class OneCore(NamedTuple):
    """What a core of this machine reaches, and what the entry makes of it."""

    flops_per_sec: float  # of a large matrix product, in the entry's dtype and in core-seconds
    utilisation: float  # in the single process's training, by its core-seconds: others stretch those less
    cores: int


def measure(
    flags: Sequence[str], steps: Sequence[CompiledStep], dtype: str, num_epochs: int
) -> tuple[OneCore, list[Measurement]]:
    """Trains the entry with as many processes as each of `steps` has devices; the first has one.

    Args:
        flags: '--config=NAME' and '--config.KEY=VALUE'.
        steps: The compiled step for each number of processes, with one batch size.
        dtype: Of the computation.
        num_epochs: To train.

    Raises:
        UserError: If a process fails; or the system cannot bind one to a core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("--measure binds each process to a core, which this system has no way to do; use Linux.")
    cores = len(os.sched_getaffinity(0))
    (flops_per_sec,) = _run_workers(["matmul", dtype])
    trained = []
    for step in steps:
        sizes = [str(collective.payload_bytes) for collective in step.collectives]
        times = [0.0] * len(sizes)
        if step.devices > 1:
            times, *_ = _run_workers(["all_reduce", *sizes], size=step.devices)
        seconds = sum(time * collective.times for time, collective in zip(times, step.collectives, strict=True))
        trained.append((step, *_train(flags, step, num_epochs), seconds))
    alone, _, core_seconds, *_ = trained[0]
    one = OneCore(flops_per_sec, alone.flops / core_seconds / flops_per_sec, cores)
    return one, [
        Measurement(step, seconds, core_seconds, all_reduce, _compute_seconds(step, one), others)
        for step, seconds, core_seconds, others, all_reduce in trained
    ]


def _compute_seconds(step: CompiledStep, one: OneCore) -> float:
    """Of a step, where processes beyond the number of cores wait for one."""
    turns = max(1.0, step.devices / one.cores)
    return step.flops / (one.flops_per_sec * one.utilisation) * turns


def _train(flags: Sequence[str], step: CompiledStep, num_epochs: int) -> tuple[float, float, float | None]:
    """A training's seconds and core-seconds a step, and what share of the cores others had."""
    with tempfile.TemporaryDirectory(prefix="fmbench-scaling-") as directory:
        command = [
            *(sys.executable, "-m", "fmbench.main", *flags, f"--config.batch_size={step.batch_size}"),
            *(f"--config.num_epochs={num_epochs}", f"--workdir={directory}/w", f"--results_dir={directory}/r"),
        ]
        before, began = load.read(), time.monotonic()
        used = _core_seconds_of_children()
        _run_all([[*command, *meet] for meet in _meetings(step.devices)])
        others = load.between(before, load.read()).other_core_seconds
        used = _core_seconds_of_children() - used
        wall = (time.monotonic() - began) * len(os.sched_getaffinity(0))
        (record,) = store.read_all(Path(directory) / "r").values()
    steps_per_epoch = record.num_steps / len(record.history)
    seconds = min(epoch.train_seconds for epoch in record.history) / steps_per_epoch
    core_seconds = min(epoch.train_core_seconds for epoch in record.history) / steps_per_epoch
    return seconds, core_seconds, None if others is None else max(0.0, others - used) / wall


def _core_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _meetings(size: int) -> list[list[str]]:
    """For each of `size` processes, the flags by which they meet."""
    if size == 1:
        return [[]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
    return [
        ["--distributed", address, f"--num_processes={size}", f"--process_id={index}"] for index in range(size)
    ]


def _run_workers(task: list[str], size: int = 1) -> list[Any]:
    """What each process of this module's `main` prints."""
    command = [sys.executable, "-m", "fmbench.studies.loopback", *task]
    return [json.loads(said) for said in _run_all([[*command, *meet] for meet in _meetings(size)]) if said]


def _run_all(commands: list[list[str]]) -> list[str]:
    """Runs them at once, each on a core; returns what they print.

    Raises:
        UserError: If one fails, with what it said; the others are ended.
    """
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        processes = []
        for index, command in enumerate(commands):
            with _bound_to(cores[index % len(cores)]):
                errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
                process = subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append((process, errors))
        said = [process.communicate()[0] for process, _ in processes]
        for process, errors in processes:
            if process.returncode:
                errors.seek(0)
                raise UserError(f"a process of --measure ended: {last_line(errors.read())}")
    return said


@contextlib.contextmanager
def _bound_to(core: int) -> Iterator[None]:
    """Processes started meanwhile have this core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _core_flops_per_sec(dtype: str) -> float:
    """The calibration's FLOP/s, in core-seconds of this process on one core: others stretch its seconds."""
    from fmbench.records import calibration

    begin, core_seconds = time.perf_counter(), time.process_time()
    flops_per_sec = calibration.measure().matmul_flops_per_sec[dtype]
    return flops_per_sec * (time.perf_counter() - begin) / (time.process_time() - core_seconds)


def _time_all_reduces(sizes: Sequence[int]) -> list[float]:
    """Seconds of an all-reduce of so many bytes of float32, over all processes."""
    import jax
    import numpy as np

    from fmbench.training import parallel

    mesh = parallel.make_mesh()
    add = jax.jit(parallel.map_over(mesh, lambda x: jax.lax.psum(x, parallel.AXIS)))
    fastest = []
    for size in sizes:
        x = parallel.replicate(np.ones(max(1, size // 4), np.float32), mesh)
        seconds = []
        for _ in range(REPETITIONS):
            begin = time.perf_counter()
            add(x).block_until_ready()
            seconds.append(time.perf_counter() - begin)
        fastest.append(min(seconds))
    return fastest


def main() -> None:
    """`matmul DTYPE`, or `all_reduce BYTES ...` with the flags of `_meetings`; process 0 prints the answer."""
    task, *rest = sys.argv[1:]
    if task == "matmul":
        print(json.dumps(statistics.median(_core_flops_per_sec(rest[0]) for _ in range(CALIBRATIONS))))
        return
    sizes = [int(word) for word in rest if word.isdigit()]
    given = dict(word.removeprefix("--").split("=") for word in rest if "=" in word)
    index = int(given["process_id"])
    place = meeting.Place(given["coordinator_address"], int(given["num_processes"]), index, 60.0)
    with meeting.joined(place, dict):
        fastest = _time_all_reduces(sizes)
        if index == 0:
            print(json.dumps(fastest))


if __name__ == "__main__":
    main()
