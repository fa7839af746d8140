"""What a training step is on many devices, read off the program that XLA compiles for so many fake CPU devices.

Nothing runs, and no device holds data: the arrays are shapes. Each program is compiled in a process of its own,
for JAX's number of devices is fixed when it starts; `python -m fmbench.studies.compiled_step` is that process.
"""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fmbench import entries
from fmbench.errors import UserError
from fmbench.system import command_line
from fmbench.system.peers import last_line
from fmbench.training import input_pipeline, parallel, steps
from fmbench.training.optimizer import make_optimizer

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# `%name = (f32[32]{0}, f32[]) all-reduce(...)`, or `... all-reduce-start(...)` where a program goes on meanwhile.
COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%?\S+ = (?P<type>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """What all devices do together, so many times a step."""

    kind: str  # of `KINDS`
    payload_bytes: int  # of the result, on each device
    times: int


class CompiledStep(NamedTuple):
    """A training step for so many devices; bytes and FLOPs are of one of them."""

    devices: int
    batch_size: int  # global
    num_train: int
    collectives: tuple[Collective, ...]  # one after another in the program
    flops: float
    resident_bytes: int  # data set and state, which stay from step to step
    temporary_bytes: int  # what a step takes beside them
    compile_seconds: float
    compiler_peak_bytes: int  # of the process that compiled


def compile_for(flags: Sequence[str], devices: int, batch_size: int) -> CompiledStep:
    """Compiles an entry's training step for `devices` fake CPU devices, in a process of its own.

    Args:
        flags: '--config=NAME' and '--config.KEY=VALUE', as `fmbench.main` takes them.
        devices: How many.
        batch_size: Global.

    Raises:
        UserError: If the devices cannot share the batch, or the config cannot be used.
    """
    command = [sys.executable, "-m", "fmbench.studies.compiled_step"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(
        [*command, *flags, f"--config.batch_size={batch_size}"],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(last_line(done.stderr).partition("fmbench.scaling: ")[2] or last_line(done.stderr))
    read = json.loads(done.stdout)
    return CompiledStep(**read | {"collectives": tuple(Collective(*one) for one in read["collectives"])})


def read_collectives(text: str) -> list[Collective]:
    """Those of a program as XLA has optimised it, `compiled.as_text()`, by kind and size; in loops once."""
    found: Counter[tuple[str, int]] = Counter()
    for line in text.splitlines():
        if match := COLLECTIVE.match(line):
            sizes = [_bytes(dtype, shape) for dtype, shape in ARRAY.findall(match["type"])]
            # What is started has operands and results in its type, one after the other.
            paired = match["start"] and match["kind"] != "all-reduce"
            found[match["kind"], sum(sizes[len(sizes) // 2 :] if paired else sizes)] += 1
    return [Collective(kind, size, count) for (kind, size), count in found.items()]


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return int(np.prod([int(size) for size in shape.split(",") if size])) * bits // 8


def _compile(flags: Sequence[str]) -> CompiledStep:
    """The step of the first stage, for all devices of this process."""
    config = entries.from_arguments(flags)
    config.parallel = "jit"  # the program is the same, and needs no arrays on the devices
    with config.unlocked():
        for name in sorted(config.stages)[1:]:
            del config.stages[name]
    # With a precision of one's own, convolutions stay in XLA, which counts their FLOPs; in oneDNN it cannot.
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh, one = parallel.make_mesh(), parallel.make_mesh(jax.devices()[:1])
    parallel.check_batch_size("batch_size", config.batch_size, mesh)
    data = input_pipeline.load(config, one)
    if data.remainder % mesh.size:
        raise UserError(
            f"config.data.remainder=keep ends an epoch with a step on {data.remainder} images, which {mesh.size} "
            "devices cannot share equally; take --config.data.remainder=drop."
        )
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    graphdef, state = steps.init_state(config, tx, one, data.seed, len(data.train_rows["label"]))
    held = (data.train_rows, data.eval_batches, state)
    resident = sum(array.nbytes for array in jax.tree.leaves(held))
    shapes = dataclasses.replace(
        data,
        train_rows=_shapes(data.train_rows),
        train_indices=jax.device_get(data.train_indices),
        eval_batches={},
        seed=jax.device_get(data.seed),
        remainder=0,
    )
    begin = time.monotonic()
    ((programs, *_), _) = steps.compile_programs(
        config, mesh, shapes, graphdef, tx, _shapes(state).replace(step=np.int32(0)), 1
    )
    seconds = time.monotonic() - begin
    program: Any = programs[1].run
    memory = program.memory_analysis()
    return CompiledStep(
        mesh.size,
        config.batch_size,
        data.num_train,
        tuple(read_collectives(program.as_text())),
        program.cost_analysis()["flops"],
        resident,
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@command_line.plain_errors("scaling")
def main() -> None:
    print(json.dumps(_compile(sys.argv[1:])._asdict()))


if __name__ == "__main__":
    main()
