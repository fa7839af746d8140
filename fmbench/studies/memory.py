"""Out of memory: which batch would fit."""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from fmbench.errors import UserError, is_out_of_memory
from fmbench.records import machine
from fmbench.training import input_pipeline, parallel, steps
from fmbench.training.optimizer import make_optimizer

MOST = {"batch_size": 60_000, "eval_batch_size": 10_000}  # images that there are; a batch of more has no use
SHARE = 0.9  # of a device's memory that a run is trusted to find in one piece
EVALUATION = (steps.evaluate, input_pipeline.eval_calls)


@contextlib.contextmanager
def explained(config: config_dict.ConfigDict, seeds: Sequence[int] = ()) -> Iterator[None]:
    """Around a run, of its own seed or several: where memory ends, the error says which batch would fit.

    Programs are compiled for a half, a quarter, ... of the batch, until one needs no more than the device has.
    Where nobody tells how much that is, as on CPUs, half the batch is proposed.

    Raises:
        UserError: In the place of MemoryError, and of what XLA raises for want of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ran = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        traceback.clear_frames(error.__traceback__)  # which hold the run's arrays
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        limit = _memory_of_device()
        has = f" with {_in_gib(limit)} for JAX" if limit else ""
        where = f"on {machine.describe_devices()}{has} ({first_line.rstrip('.')})"
        if steps.init_state.__code__ in ran:
            raise UserError(f"out of memory for the model alone {where}; take a smaller one.") from error
        field = "eval_batch_size" if {function.__code__ for function in EVALUATION} & ran else "batch_size"
        remedy = _remedy(config, seeds, field, limit)
        raise UserError(f"out of memory with config.{field}={config[field]} {where}; {remedy}.") from error


def _remedy(config: config_dict.ConfigDict, seeds: Sequence[int], field: str, limit: int | None) -> str:
    smaller = [batch for batch in _parts(config[field]) if batch <= MOST[field]]
    if not smaller:
        return "take a smaller model"
    if limit is None:
        return f"config.{field}={smaller[0]} may fit: how much memory there is, is not known here"
    for batch in smaller:
        copy = config.copy_and_resolve_references()
        copy[field] = batch
        needed = _needed_bytes(copy, seeds)
        if needed is not None and needed <= SHARE * limit:
            return f"config.{field}={batch} is predicted to fit, with {_in_gib(needed)}"
    return f"no smaller batch down to {smaller[-1]} is predicted to fit; take a smaller model"


def _parts(batch: int) -> Iterator[int]:
    """A half, a quarter, ... of a batch, rounded to what the devices can share."""
    devices = jax.device_count()
    while (batch := batch // 2) >= devices:
        yield batch // devices * devices


def _memory_of_device() -> int | None:
    """The bytes that JAX may allocate on the smallest device of this process, if they tell."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min((limit for limit in limits if limit), default=None)


def _needed_bytes(config: config_dict.ConfigDict, seeds: Sequence[int]) -> int | None:
    """The most that a run holds on each device, as its compiled programs say; None if even they find no place."""
    try:
        mesh = parallel.make_mesh()
        data = input_pipeline.load(config, mesh, seeds)
        tx, _ = make_optimizer(config, data.steps_per_epoch)
        graphdef, state = steps.init_state(config, tx, mesh, data.seed, data.num_rows)
        steps_per_call = steps.choose_steps_per_call(config, data.whole_batches)
        trainings, evaluations = steps.compile_programs(config, mesh, data, graphdef, tx, state, steps_per_call)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return None
        raise
    programs = [program for by_length in (evaluations, *trainings) for program in by_length.values()]
    resident = sum(array.nbytes for array in jax.tree.leaves((data.resident, state)))
    return resident + max(_bytes_of(getattr(program.run, "func", program.run)) for program in programs)


def _bytes_of(compiled: Any) -> int:
    """What a program takes beside its arguments, which are there anyway."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _in_gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
