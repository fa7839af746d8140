"""A training step layer by layer: the least work that each has to do, beside the time that it takes.

The work is counted in the step as JAX traces it, the time is that of XLA's operations in a profile of real steps;
layer and direction, which both carry, bring them together. `python -m fmbench.throughput.layers CONFIG DTYPE` is
the process in which a step is profiled.
"""

import dataclasses
import functools
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fmbench import config as config_lib
from fmbench import entries
from fmbench.errors import UserError
from fmbench.models import split_model
from fmbench.system import command_line, runtime
from fmbench.system.peers import last_line
from fmbench.throughput import trace
from fmbench.throughput.measurements import Dtype, Layer, Profile
from fmbench.training import input_pipeline, parallel, selection, steps
from fmbench.training.optimizer import make_optimizer

TAKES, SECONDS = 5, 0.4  # profiles, and how long each is at the least
WARM_UP, MOST_STEPS = 4, 8  # with which no epoch of 48 and more steps ends meanwhile
TIMEOUT = 600.0  # seconds that a net may take, with compilation
SCOPE = "layer:"
NET = "."  # the path of what the net does between its layers
FORWARD, GRADIENT = "forward", "gradient"
KERNEL_GRADIENT, INPUT_GRADIENT = "kernel gradient", "input gradient"
REST = "bias, ReLU, casts, copies"  # what else is done for a convolution or a dense layer
POOLING, BETWEEN, ELSE = "pooling", "activations and sums", "other"
# What belongs to no layer of the net, by the file whose code asks for it; the first that fits.
PARTS = {
    "layers/pooling.py": POOLING,
    "training/augment.py": "augmentation",
    "training/input_pipeline.py": "gather and normalise",
    "training/selection.py": "selection",
    "losses/": "loss",
    "optax/": "optimizer",
    "training/optimizer.py": "optimizer",
}
PRODUCTS = ("dot", "convolution")  # as XLA calls them
LIBRARIES = ("onednn.", "winograd_", "direct_", "conv", "gemm", "matmul")  # in names of custom calls: products


def profile(spec: str, dtype: Dtype, environ: Mapping[str, str]) -> Profile:
    """Profiles an entry's training step in a process of its own.

    Raises:
        UserError: If that fails, whatever the reason; so nothing else is lost.
    """
    command = [sys.executable, "-m", "fmbench.throughput.layers", spec, dtype]
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{spec}: no profile within {TIMEOUT:g} s.") from None
    if done.returncode:
        raise UserError(f"{spec}: no profile: {last_line(done.stderr)}")
    try:
        return Profile.model_validate_json(done.stdout)
    except ValueError:
        raise UserError(f"{spec}: no profile: its process answered {done.stdout[:80]!r}.") from None


# The work, as JAX traces the step.


class Place(NamedTuple):
    """Where in the step something is done."""

    path: str  # of the layer in the net, as 'blocks.0.conv1', or `NET`; empty outside of the net
    is_gradient: bool


class Work(NamedTuple):
    """A matrix product or a convolution, or several alike in a loop."""

    place: Place
    direction: str
    dtype: Dtype
    flops: float
    bytes: float  # of operands and results
    result_size: int  # numbers


def place(name_stack: str) -> Place:
    """The place that JAX's name stack tells, by the innermost layer in it."""
    paths = re.findall(rf"{SCOPE}([\w.]+)", name_stack)
    return Place(paths[-1] if paths else "", "transpose(" in name_stack)


def count_work(jaxpr: Any, stack: str = "", times: int = 1) -> Iterator[Work]:
    """Every matrix product and convolution of a program; in loops as often as it is done."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        within = f"{stack}/{equation.source_info.name_stack}"
        if name in FLOPS:
            operands, results = (
                [variable.aval for variable in some] for some in (equation.invars, equation.outvars)
            )
            at = place(within)
            yield Work(
                at,
                _direction(equation) if at.is_gradient else FORWARD,
                "bfloat16" if operands[0].dtype == jax.numpy.bfloat16 else "float32",
                times * FLOPS[name](equation.params, operands, results[0]),
                times * sum(array.size * array.dtype.itemsize for array in (*operands, *results)),
                results[0].size,
            )
        inner_times = times * (equation.params["length"] if name == "scan" else 1)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from count_work(inner, within, inner_times)


def _direction(equation: Any) -> str:
    """Which of its two gradients a layer's product is: that for the kernel sums over the batch, the first axis."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted, _ = params["dimension_numbers"]
        of_kernel = all(0 in axes for axes in contracted)
    elif name == "conv_general_dilated":
        of_kernel = params["dimension_numbers"].lhs_spec[0] != 0
    else:
        of_kernel = name == "convolution_kernel_grad"
    return KERNEL_GRADIENT if of_kernel else INPUT_GRADIENT


def _flops_of_dot(params: Mapping[str, Any], operands: Sequence[Any], result: Any) -> float:
    ((contracted, _), _) = params["dimension_numbers"]
    return 2.0 * result.size * int(np.prod([operands[0].shape[axis] for axis in contracted]))


def _flops_of_xlas_convolution(params: Mapping[str, Any], operands: Sequence[Any], result: Any) -> float:
    """Zeros of the padding, and between the numbers of a dilated input, count as numbers."""
    kernel = operands[1]
    return 2.0 * result.size * kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]


def _flops_of_convolution(params: Mapping[str, Any], operands: Sequence[Any], result: Any) -> float:
    """In any direction; of each output the taps that lie within the input."""
    window = params["window"]
    size = params.get("size", operands[0].shape[1:3])
    taps = 1
    for length, outputs, side, stride, (before, _) in zip(
        size, window.output_size(*size), window.size, window.strides, window.padding, strict=True
    ):
        at = stride * np.arange(outputs)[:, None] + np.arange(side) - before
        taps *= int(np.count_nonzero((at >= 0) & (at < length)))
    kernel = result if "use_bias" in params else operands[1]  # the gradient for the kernel has that
    return 2.0 * operands[0].shape[0] * taps * kernel.shape[2] * kernel.shape[3]


# Those of fmbench.layers.convolution_primitives too.
FLOPS = {
    "dot_general": _flops_of_dot,
    "conv_general_dilated": _flops_of_xlas_convolution,
    "convolution": _flops_of_convolution,
    "convolution_input_grad": _flops_of_convolution,
    "convolution_kernel_grad": _flops_of_convolution,
}


def scoped(model: nnx.Module) -> nnx.Module:
    """Has the model's layers say where they are in all that JAX and XLA make of them. Returns the model."""
    modules = list(nnx.iter_modules(model))
    paths = {".".join(map(str, path)) for path, _ in modules}
    for parts, module in modules:
        path = ".".join(map(str, parts))
        if not path or not any(other.startswith(f"{path}.") for other in paths):
            scope = SCOPE + (path or NET)
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"__call__": _in_scope(scope, kind.__call__)})
    return model


def _in_scope(scope: str, call: Any) -> Any:
    @functools.wraps(call)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        with jax.named_scope(scope):
            return call(*arguments, **named)

    return wrapper


# The operations, as XLA has optimised the program.

PASSED_ON = ("bitcast", "get-tuple-element")  # which are what their operand is
FREE = ("constant", "parameter", "tuple", *PASSED_ON)
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]")


class Operation(NamedTuple):
    """A line of the program."""

    name: str
    kind: str  # fusion, dot, custom-call, ...
    results: tuple[tuple[int, int], ...]  # of each array: numbers, bytes
    operands: tuple[str, ...]
    calls: tuple[str, ...]  # computations
    computation: str
    is_root: bool
    place: Place
    part: str  # of `PARTS`, or empty
    target: str  # of a custom call

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product or a convolution."""
        return self.kind in PRODUCTS or any(name in self.target for name in LIBRARIES)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.results)


class Program:
    """The lines of a program as `compiled.as_text()` has it, by name."""

    def __init__(self, text: str):
        part = _parts(text)
        self.module = re.sub(r"^HloModule ([^,\s]*).*", r"\1", text.partition("\n")[0])
        self.lines: dict[str, Operation] = {}
        self.entry = computation = ""
        for line in text.splitlines():
            if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.-]+) \(", line)):
                computation = match[2]
                self.entry = computation if match[1] else self.entry
            elif match := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)$", line):
                self.lines[match[2]] = _operation(match[2], match[3], computation, bool(match[1]), part)
        self.by_computation: dict[str, list[Operation]] = defaultdict(list)
        self.callers: dict[str, Operation] = {}
        for operation in self.lines.values():
            self.by_computation[operation.computation].append(operation)
            self.callers |= dict.fromkeys(operation.calls, operation)

    def product(self, operation: Operation) -> Operation | None:
        """The matrix product or convolution that an operation is, or is a fusion around."""
        inner = [one for called in operation.calls for one in self.by_computation[called] if one.is_product]
        return operation if operation.is_product else inner[0] if inner and operation.kind == "fusion" else None

    def whereabouts(self, operation: Operation) -> tuple[Place, str]:
        """Place and part.

        Of an operation without, as XLA makes them where it converts and sums, those of the last line that has them
        in its fusion, or else of the operation that calls it, or that gives its first operand.
        """
        seen: set[str] = set()
        while operation.name not in seen:
            seen.add(operation.name)
            lines = [operation]
            if operation.kind == "fusion":
                lines += [line for called in operation.calls for line in reversed(self.by_computation[called])]
            for line in lines:
                if line.place.path or line.part:
                    return line.place, line.part
            given = self.lines.get(operation.operands[0]) if operation.operands else None
            operation = self.callers.get(operation.computation) or given or operation
        return Place("", False), ""

    def traffic(self, names: set[str]) -> int:
        """Bytes that operations move if they are one: what they read of others, and others of them."""
        read: dict[str, int] = {}
        written: dict[str, int] = {}
        for user in self.by_computation[self.entry]:
            if user.kind in PASSED_ON:
                continue
            for operand in user.operands:
                array = source = self.lines[operand]
                while source.kind in PASSED_ON:
                    array = self.lines[source.operands[0]] if source.kind == "bitcast" else source
                    source = self.lines[source.operands[0]]
                if source.kind == "constant" or (source.name in names) == (user.name in names):
                    continue
                if source.name in names:
                    written[array.name] = array.bytes
                elif user.kind != "tuple":
                    # Of the data set an operation reads no more than it returns.
                    of_data = source.kind == "parameter" and re.match(r"rows|order", source.name)
                    read[array.name] = min(array.bytes, user.bytes) if of_data else array.bytes
        return sum(read.values()) + sum(written.values())


def _parts(text: str) -> Callable[[str], str]:
    """By the number of a stack frame, the part of the step that it lies in."""
    tables = text.partition("\nFileNames\n")[2].partition("\n%")[0]
    files = dict(re.findall(r'^(\d+) "(.*)"$', tables.partition("\n\n")[0], re.MULTILINE))
    locations = dict(re.findall(r"^(\d+) \{file_name_id=(\d+)", tables, re.MULTILINE))
    frames = {
        number: (location, parent)
        for number, location, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", tables, re.MULTILINE
        )
    }
    # XLA's text counts parents from one on, and the first frame, which has none, as its own.
    shift = int(frames.get("1", ("", ""))[1] == "1")

    @functools.cache
    def part(frame: str) -> str:
        location, parent = frames.get(frame, ("", ""))
        file = files.get(locations.get(location, ""), "")
        caller = str(int(parent) - shift) if parent else ""
        return next((name for end, name in PARTS.items() if end in file), "") or (
            part(caller) if caller in frames else ""
        )

    return part


def _operation(name: str, text: str, computation: str, is_root: bool, part: Callable[[str], str]) -> Operation:
    """Of the text after the equals sign: type, kind, operands in parentheses, attributes."""
    returned, text = _split_type(text)
    kind, _, text = text.partition("(")
    operands, _, attributes = text.partition(")")

    def attribute(pattern: str) -> str:
        match = re.search(pattern, attributes)
        return match[1] if match else ""

    return Operation(
        name,
        kind.strip(),
        tuple(_size(*array) for array in ARRAY.findall(returned)),
        tuple(re.findall(r"%([\w.-]+)", operands)),
        tuple(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", attributes)),
        computation,
        is_root,
        place(attribute(r'op_name="([^"]*)"')),
        part(attribute(r"stack_frame_id=(\d+)")),
        attribute(r'custom_call_target="([^"]*)"'),
    )


def _split_type(text: str) -> tuple[str, str]:
    """'(f32[2], s32[]) tuple(...' -> '(f32[2], s32[])' and 'tuple(...'."""
    depth = 0
    for end, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == " " and not depth:
            return text[:end], text[end + 1 :]
    return text, ""


def _size(dtype: str, shape: str) -> tuple[int, int]:
    """Numbers and bytes."""
    numbers = math.prod(int(side) for side in shape.split(",") if side)
    return numbers, numbers * (8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))) // 8


# Both together.


class Row(NamedTuple):
    """A line of the table to be."""

    layer: str
    direction: str


@dataclasses.dataclass
class Cost:
    """As `Layer` has it."""

    dtype: Dtype = "float32"
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


def match(
    work: Iterable[Work], program: Program, seconds: Mapping[str, float], kinds: Mapping[str, str]
) -> dict[Row, Cost]:
    """What each layer has to do and the time that it takes, in each direction.

    Products have their FLOPs, and the bytes of their operands and results. All else has no FLOPs that count, and
    the bytes that the operations of a row would move if they were one.

    Args:
        work: Of the step.
        program: Of the step.
        seconds: Of each operation in a step, as far as it has been seen.
        kinds: The class of each layer, by its path.
    """
    rows: dict[Row, Cost] = {}
    of_place: dict[Place, list[Work]] = defaultdict(list)
    for one in work:
        of_place[one.place].append(one)
        cost = rows.setdefault(_row_of_work(one), Cost(one.dtype))
        cost.flops += one.flops
        cost.bytes += one.bytes

    def row_of(operation: Operation) -> Row:
        product = program.product(operation)
        if product and (candidates := of_place[program.whereabouts(product)[0]]):
            sizes = {numbers for numbers, _ in (*operation.results[:1], *product.results[:1])}
            same = [one for one in candidates if one.result_size in sizes] or candidates
            named = [one for one in same if one.direction.replace(" gradient", "_grad") in product.target]
            return _row_of_work((named or same)[0])
        at, part = program.whereabouts(operation)
        direction = GRADIENT if at.is_gradient else FORWARD
        if part == POOLING or at.path in kinds:
            has_products = of_place[Place(at.path, False)] and part != POOLING
            return Row(REST if has_products else part or at.path, direction)
        return Row(BETWEEN, direction) if at.path and not part else Row(part or ELSE, "")

    members: dict[Row, set[str]] = defaultdict(set)
    for operation in program.lines.values():
        is_own = operation.computation == program.entry and operation.kind not in FREE
        if is_own or operation.name in seconds:
            row = row_of(operation)
            rows.setdefault(row, Cost()).seconds += seconds.get(operation.name, 0.0)
            if is_own:
                members[row].add(operation.name)
    for row, names in members.items():
        if not rows[row].flops:
            rows[row].bytes = program.traffic(names)
    return rows


def _row_of_work(work: Work) -> Row:
    return Row(work.place.path, work.direction) if work.place.path else Row("optimizer: products", "")


def together(rows: Mapping[Row, Cost], kinds: Mapping[str, str]) -> list[Layer]:
    """Layers of a class that have as much to do, as one; of a class without products, all."""
    alike: dict[Any, list[Row]] = defaultdict(list)
    for row, cost in rows.items():
        work = cost.flops and (cost.dtype, cost.flops, cost.bytes)
        key = (kinds[row.layer], row.direction, work) if row.layer in kinds else row
        alike[key].append(row)
    layers = []
    for members in alike.values():
        first, *others = (rows[row] for row in members)
        for other in others:
            first.flops, first.bytes = first.flops + other.flops, first.bytes + other.bytes
            first.seconds += other.seconds
        layers.append(
            Layer(
                layers=sorted({row.layer for row in members}),
                direction=members[0].direction,
                dtype=first.dtype,
                flops=first.flops,
                bytes=first.bytes,
                seconds=first.seconds,
            )
        )
    return layers


# The process that is profiled.


def _profile(spec: str, dtype: Any) -> Profile:
    config = entries.resolve(spec, {})
    with config.unlocked():
        config.dtype = dtype
    # Programs are found in the cache by all but names of layers, which are what is asked for here.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    mesh = parallel.make_mesh(jax.devices()[:1])
    data = dataclasses.replace(input_pipeline.load(config, mesh), eval_batches={}, remainder=0)
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    graphdef, state = steps.init_state(config, tx, mesh, data.seed, len(data.train_rows["label"]))
    model = scoped(nnx.merge(graphdef, state.params, state.model_state))
    kinds = {".".join(map(str, path)): type(module).__name__ for path, module in nnx.iter_modules(model) if path}
    graphdef = split_model(model)[0]
    (programs, *_), _ = steps.compile_programs(config, mesh, data, graphdef, tx, state, 1)
    run: Any = programs[1].run
    program = Program(run.as_text())
    step = functools.partial(
        steps.train_step,
        graphdef=graphdef,
        tx=tx,
        batch_size=config.batch_size,
        num_examples=config.batch_size,
        normalization=config.data.normalization,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        augment=config_lib.stages(config)[0].augment,
    )
    arguments = data.feed(0, selection.losses_of_epoch(state.losses, is_new=True))
    work = list(count_work(jax.make_jaxpr(parallel.map_over(mesh, step))(state, *arguments(1)).jaxpr))

    def take(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, _ = run(state, *arguments(1))
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / count

    take(WARM_UP // 2)
    count = min(max(1, math.ceil(SECONDS / take(WARM_UP // 2))), MOST_STEPS)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    unprofiled, profiled = [], []
    for _ in range(TAKES):
        unprofiled.append(take(count))
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory, profiler_options=options):
                seconds_per_step = take(count)
            seen = trace.operation_seconds(trace.read(Path(directory)), program.module)
        profiled.append((seconds_per_step, {name: seconds / count for name, seconds in seen.items()}))
    # One of them as it was, not medians of each operation: so its rows add up.
    step_seconds, seconds = sorted(profiled, key=lambda profile: profile[0])[TAKES // 2]
    known = {name: seconds[name] for name in seconds.keys() & program.lines.keys()}
    return Profile(
        batch_size=config.batch_size,
        dtype=dtype,
        steps=count,
        step_seconds=step_seconds,
        unprofiled_step_seconds=statistics.median(unprofiled),
        layers=together(match(work, program, known, kinds), kinds),
    )


@command_line.plain_errors("benchmark")
def main() -> None:
    runtime.set_up()
    print(_profile(*sys.argv[1:]).model_dump_json())


if __name__ == "__main__":
    main()
