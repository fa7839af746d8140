"""Whether a device computes what a CPU does, as the programs that run there are meant to.

On a CPU the check is a rehearsal: it compares the CPU with itself, and judges no programs.
"""

import functools
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import config_dict

from fmbench import entries, layers
from fmbench.device import program
from fmbench.training import input_pipeline, parallel, steps
from fmbench.training.checkpoint import Checkpoints
from fmbench.training.optimizer import make_optimizer

# How far from the CPU's float32, as a share of the largest number. Accelerators multiply float32 in fewer bits
# (TF32) unless they are asked for the highest precision.
TOLERANCE = {("float32", "highest"): 1e-4, ("float32", None): 2e-2, ("bfloat16", None): 1e-1}
NETS = ("speedrun:94", "cnn4")  # with all kinds of layers there are
PROGRAMS = {"speedrun:94": "bfloat16", "vgg_like": "float32", "resnet:20": "bfloat16"}  # as the suite runs them
DETERMINISTIC = {"xla_gpu_deterministic_ops": True}
COMPILED_SOON = {"xla_backend_optimization_level": 0}  # for the CPU, which is not timed
# A fourth step, and at a speed record's rate rounding errors are a thousand times larger.
BATCH_SIZE, NUM_STEPS = 48, 3


class Finding(NamedTuple):
    """What one part of the check found."""

    name: str
    ok: bool
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':6} {self.name}: {self.detail} ({self.seconds:.0f} s)"


def check() -> Iterator[Finding]:
    """The findings, one by one as they are made; an error in one is its failure."""
    parts: dict[str, Callable[[], tuple[bool, str]]] = {
        "random numbers": random_numbers_are_equal,
        "layers": layers_agree,
        "steps": steps_agree,
        "jit and pmap": jit_and_pmap_agree,
        "going on from a checkpoint": resumes_to_the_same_bits,
        "programs": programs_are_as_meant,
        "peak memory": peak_memory_is_told,
    }
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            ok, detail = part()
        except Exception as error:  # whatever a device may do: the other parts are still worth knowing
            traceback.print_exc()
            ok, detail = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield Finding(name, ok, detail, time.perf_counter() - start)


def _cpu() -> jax.Device:
    return jax.devices("cpu")[0]


def _on(device: jax.Device, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives on a device."""
    return jax.device_get(jax.jit(function)(*jax.device_put(arguments, device)))


def _distance(got: Any, expected: Any) -> float:
    """The largest difference of two trees of arrays, as a share of the largest number of the array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    distances = [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in arrays]
    return math.inf if any(math.isnan(distance) for distance in distances) else max(distances)


# ---------------------------------------------------------------------------- numbers


def random_numbers_are_equal() -> tuple[bool, str]:
    """Initial values, orders and masks come of integers, which are the same everywhere."""

    def draw(seed: jax.Array) -> Any:
        key = jax.random.key(seed)
        keys = jax.random.split(key, 8)
        return (
            jax.random.bits(key, (100,)),
            jax.random.permutation(key, 1000),
            layers.dropout.random_words(keys, (9,)),
        )

    draws = [_on(device, draw, np.uint32(7)) for device in (jax.devices()[0], _cpu())]
    equal = all(np.array_equal(a, b) for a, b in zip(*draws, strict=True))
    return equal, "bits, permutations and dropout's words are the CPU's" if equal else "they are not the CPU's"


class Distances:
    """The largest distance from the CPU's float32 of each dtype and precision, and where it was."""

    def __init__(self) -> None:
        self.worst: dict[tuple[str, str | None], tuple[float, str]] = {}

    def add(self, name: str, compute: Callable[[str, jax.Device], Any]) -> None:
        """Compares what `compute(dtype, device)` gives."""
        with jax.default_matmul_precision("highest"):  # plain sums, not Winograd's, whose rounding steps multiply
            expected = compute("float32", _cpu())
        for dtype, precision in TOLERANCE:
            with jax.default_matmul_precision(precision):
                distance = _distance(compute(dtype, jax.devices()[0]), expected)
            self.worst[dtype, precision] = max(self.worst.get((dtype, precision), (0.0, "")), (distance, name))

    def judge(self) -> tuple[bool, str]:
        """Whether all are within the tolerances, and what they are."""
        texts = [
            f"{precision + ' precision ' if precision else ''}{dtype} {distance:.0e} of {tolerance:.0e} ({name})"
            for ((dtype, precision), tolerance), (distance, name) in zip(
                TOLERANCE.items(), self.worst.values(), strict=True
            )
        ]
        return all(self.worst[key][0] <= tolerance for key, tolerance in TOLERANCE.items()), "; ".join(texts)


def layers_agree() -> tuple[bool, str]:
    """Each layer's results and gradients."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 16, 14, 14, 32), np.float32)
    x = np.asarray(jnp.bfloat16(x))  # so that no dtype sees other ties
    rngs = nnx.Rngs(0)
    nets: dict[str, Callable[[Any], Any]] = {
        "3x3 convolution": lambda dtype: layers.Conv(32, 48, (3, 3), dtype=dtype, rngs=rngs),
        "strided convolution": lambda dtype: layers.Conv(32, 32, (3, 3), strides=2, dtype=dtype, rngs=rngs),
        "batch norm": lambda dtype: layers.BatchNorm(32, dtype=dtype, rngs=rngs),
        "dense layer": lambda dtype: nnx.Linear(32, 24, dtype=dtype, rngs=rngs),
        "max pooling": lambda dtype: functools.partial(layers.max_pool, window_shape=2),
    }
    distances = Distances()
    for name, make in nets.items():
        made = {dtype: make(dtype) for dtype in ("float32", "bfloat16")}
        if isinstance(made["float32"], nnx.Module):
            nnx.update(made["bfloat16"], nnx.state(made["float32"]))  # the same initial values

        def compute(dtype: str, device: jax.Device, made: dict[str, Any] = made) -> Any:
            return _on(device, functools.partial(_value_and_gradients, made[dtype]), x.astype(dtype), weight)

        distances.add(name, compute)
    return distances.judge()


def _value_and_gradients(layer: Any, x: jax.Array, weight: jax.Array) -> Any:
    """What a layer gives, and the gradients of a weighted mean of that."""
    graphdef, params, *rest = nnx.split(layer, nnx.Param, ...)

    def weighted_mean(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graphdef, params, *rest, copy=True)(x).astype(jnp.float32)
        return (y * jnp.resize(weight, y.shape)).mean(), y

    return jax.value_and_grad(weighted_mean, argnums=(0, 1), has_aux=True)(params, x)


# ---------------------------------------------------------------------------- steps


def _config(spec: str, **overrides: Any) -> config_dict.ConfigDict:
    plain = {"data.source": "sample", "data.split": "all", "batch_size": BATCH_SIZE, "steps_per_call": 1}
    return entries.resolve(spec, plain | overrides)


class Trial:
    """A little training: NUM_STEPS steps on the sample's images."""

    def __init__(
        self, config: config_dict.ConfigDict, mesh: Mesh, compiler_options: dict[str, Any] | None = None
    ) -> None:
        self.data = input_pipeline.load(config, mesh)
        tx, _ = make_optimizer(config, self.data.steps_per_epoch)
        graphdef, self.state = steps.init_state(
            config, tx, mesh, self.data.seed, len(self.data.train_rows["label"])
        )
        steps_per_call = steps.choose_steps_per_call(config, self.data.whole_batches)
        (programs, *_), _ = steps.compile_programs(
            config, mesh, self.data, graphdef, tx, self.state, steps_per_call, compiler_options
        )
        self.program: Any = programs[steps_per_call].run

    def run(self, state: steps.TrainState, num_calls: int) -> tuple[steps.TrainState, list[np.ndarray]]:
        order = self.data.epoch_order(0)
        losses = []
        with jax.transfer_guard("disallow"):  # nothing between host and device but the calls themselves
            for _ in range(num_calls):
                state, metrics = self.program(state, self.data.train_rows, order, self.data.seed)
                losses.append(metrics["loss"])
        return state, jax.device_get(losses)


def steps_agree() -> tuple[bool, str]:
    """The losses of a few steps of whole nets."""
    distances = Distances()
    for spec in NETS:

        def compute(dtype: str, device: jax.Device, spec: str = spec) -> list[np.ndarray]:
            return _losses(_config(spec, dtype=dtype), device)

        distances.add(spec, compute)
    return distances.judge()


def _losses(config: config_dict.ConfigDict, *devices: jax.Device) -> list[np.ndarray]:
    options = COMPILED_SOON if devices[0].platform == "cpu" else None
    trial = Trial(config, parallel.make_mesh(list(devices)), options)
    return trial.run(trial.state, NUM_STEPS)[1]


def jit_and_pmap_agree() -> tuple[bool, str]:
    losses = [_losses(_config("cnn4", parallel=mode), *jax.devices()) for mode in ("jit", "pmap")]
    distance = _distance(*losses)
    return distance < 1e-3, f"losses over {len(jax.devices())} device(s) {distance:.0e} apart"


def resumes_to_the_same_bits() -> tuple[bool, str]:
    """A run that goes on from a checkpoint against one that was never stopped; and how far apart by default."""
    apart = {}
    for name, options in {"deterministic": DETERMINISTIC, "by default": None}.items():
        trial = Trial(_config("cnn4"), parallel.make_mesh(), options)
        start = jax.tree.map(jnp.copy, trial.state)
        undisturbed, _ = trial.run(trial.state, 2 * NUM_STEPS)
        stopped, _ = trial.run(start, NUM_STEPS)
        with tempfile.TemporaryDirectory() as directory:
            checkpoints = Checkpoints(Path(directory) / "checkpoints")
            checkpoints.save(NUM_STEPS, stopped, {})
            restored = checkpoints.restore(stopped)
        assert restored
        resumed, _ = trial.run(restored[0], NUM_STEPS)
        apart[name] = _distance(resumed.params, undisturbed.params)
    return apart["deterministic"] == 0, ", ".join(
        f"{name} {distance:.0e} apart" for name, distance in apart.items()
    )


# ---------------------------------------------------------------------------- programs


def programs_are_as_meant() -> tuple[bool, str]:
    """Reads the compiled training programs, those that the suite runs: so compiling them is not for nothing."""
    mistakes, seen = [], []
    for spec, dtype in PROGRAMS.items():
        config = entries.resolve(spec, {"dtype": dtype})
        trial = Trial(config, parallel.make_mesh())
        contents = program.read_compiled(trial.program.as_text())
        of_activations = [kind for kind in contents.transposes if _size(kind) >= config.batch_size * 28 * 28]
        seen.append(f"{config.entry} {dict(contents.convolutions)}")
        if "f64" in contents.dtypes:
            mistakes.append(f"{config.entry} computes in float64")
        if contents.host_transfers:
            mistakes.append(f"{config.entry} exchanges data with the host: {', '.join(contents.host_transfers)}")
        if len(contents.donated) < len(jax.tree.leaves(trial.state)):
            mistakes.append(f"{config.entry} keeps a second copy of its state")
        if of_activations:
            mistakes.append(
                f"{config.entry} transposes activations {len(of_activations)} times: {of_activations[0]}"
            )
    if jax.default_backend() == "cpu":
        return True, "those of CPUs are not judged"
    return not mistakes, "; ".join(mistakes or [f"convolutions by dtype: {', '.join(seen)}"])


def _size(kind: str) -> int:
    """Elements of 'f32[512,28,28,64]'."""
    return int(np.prod([int(length) for length in kind.partition("[")[2].rstrip("]").split(",") if length]))


def peak_memory_is_told() -> tuple[bool, str]:
    statistics = jax.devices()[0].memory_stats() or {}
    if jax.default_backend() == "cpu":
        return True, "CPUs don't tell; the process's is recorded"
    peak, limit = (statistics.get(name, 0) for name in ("peak_bytes_in_use", "bytes_limit"))
    return peak > 0, f"{peak / 2**30:.1f} of {limit / 2**30:.1f} GiB"
