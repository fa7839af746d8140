"""The convolutions in C++ of fmbench/layers beside oneDNN's, in turns: layers, then a step of vgg_like.

    python benchmarks/cpp.py            # 128 -> 256 channels by Winograd, forward: the experiment's rule
    python benchmarks/cpp.py --layers=conv4,conv3,conv2 --directions=forward,input,kernel
    python benchmarks/cpp.py --layers=first64,first32,narrow4,narrow8 --directions=forward,input,kernel  # direct
    python benchmarks/cpp.py --step     # a training step of vgg_like with either

A round runs one after the other on the same arrays, each with the preparation of the kernel that training needs at
each call. Printed are medians over the rounds, and the largest error of each against float64, as a part of the
largest value.
"""

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_int, c_void_p
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fmbench.errors import UserError
from fmbench.layers import cpp, direct, onednn, winograd
from fmbench.layers.cpp import ARRAYS
from fmbench.layers.onednn import Window
from fmbench.models import MODELS
from fmbench.system import cgroup, runtime

RESULTS = {"forward": ("y",), "input": ("x",), "kernel": ("kernel", "bias")}
FUNCTIONS = {"forward": "forward", "input": "input_grad", "kernel": "kernel_grad"}

HEADER = """\
| layer | direction | threads | oneDNN, ms | C++, ms | ratio | error oneDNN | error C++ | parts, ms |
|:--|:--|--:|--:|--:|--:|--:|--:|:--|"""


class Layer(NamedTuple):
    """A convolution of 3 x 3."""

    size: int  # height and width of the input
    inputs: int
    outputs: int
    padding: int
    algorithm: str = "winograd"

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        y_size = self.size + 2 * self.padding - 2
        return {
            "x": (batch, self.size, self.size, self.inputs),
            "kernel": (3, 3, self.inputs, self.outputs),
            "bias": (self.outputs,),
            "y": (batch, y_size, y_size, self.outputs),
        }


LAYERS = {
    "conv2": Layer(28, 32, 64, 1),
    "conv3": Layer(14, 64, 128, 1),
    "conv4": Layer(14, 128, 256, 0),
    "first64": Layer(28, 1, 64, 0, "direct"),
    "first32": Layer(28, 1, 32, 0, "direct"),
    "narrow4": Layer(28, 4, 32, 1, "direct"),
    "narrow8": Layer(28, 8, 64, 1, "direct"),
}


# C++.


def prepare_cpp(
    library: ctypes.CDLL, algorithm: str, direction: str, padding: int, arrays: dict[str, np.ndarray], threads: int
) -> tuple[Callable[[], None], cpp.Convolution]:
    """What computes the direction's results into their arrays, and where it leaves its times."""
    _, height, width, inputs = arrays["x"].shape
    pointers = [arrays[name].ctypes.data for name in ARRAYS]
    batch, outputs = len(arrays["x"]), len(arrays["bias"])
    call = cpp.Convolution(batch, height, width, inputs, outputs, padding, False, threads, *pointers)

    def run() -> None:
        if getattr(library, f"{algorithm}_{FUNCTIONS[direction]}")(byref(call)):
            raise UserError(f"there is no code for {inputs} -> {outputs} channels.")

    return run, call


# oneDNN.


def prepare_onednn(direction: str, padding: int, arrays: dict[str, np.ndarray]) -> Callable[[], None]:
    """What oneDNN runs in fmbench's layers, on arrays of ours."""
    library = onednn._onednn()
    window = Window((3, 3), (1, 1), ((padding, padding), (padding, padding)))
    x_shape, kernel_shape = arrays["x"].shape, arrays["kernel"].shape
    settings = x_shape, kernel_shape, window, "float32"
    make: Any
    make, *further = {
        "forward": (onednn._convolution, False),
        "input": (onednn._convolution_input_grad,),
        "kernel": (onednn._convolution_kernel_grad, True),
    }[direction]
    order = {"forward": ("x", "kernel", "bias", "y"), "input": ("y", "kernel", "x")}
    order["kernel"] = ("x", "y", "kernel", "bias")
    with mock.patch.object(onednn, "_register", lambda _, *parts: parts):
        arguments, results, primitives = make.__wrapped__(*settings, *further)
    for memory, name in zip((*arguments, *results), order[direction], strict=True):
        library.call("memory_set_data_handle", memory.handle, c_void_p(arrays[name].ctypes.data))

    def run() -> None:
        for primitive in primitives:
            library.call(
                "primitive_execute",
                primitive.handle,
                library.stream,
                len(primitive.arguments),
                primitive.arguments,
            )
        library.call("stream_wait", library.stream)

    return run


# Both, a layer.


def in_float64(direction: str, padding: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The direction's results, by nine products of matrices."""
    x, kernel, bias, y = (arrays[name].astype(np.float64) for name in ARRAYS)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    results = {name: np.zeros(array.shape) for name, array in zip(ARRAYS, (x, kernel, bias, y), strict=True)}
    for i in range(3):
        for j in range(3):
            rows, columns = slice(i, i + y.shape[1]), slice(j, j + y.shape[2])
            if direction == "forward":
                results["y"] += x[:, rows, columns] @ kernel[i, j]
            elif direction == "input":
                results["x"][:, rows, columns] += y @ kernel[i, j].T
            else:
                results["kernel"][i, j] = np.tensordot(x[:, rows, columns], y, ((0, 1, 2), (0, 1, 2)))
    results["y"] += bias
    results["bias"] = y.sum((0, 1, 2))
    inside = slice(padding, x.shape[1] - padding), slice(padding, x.shape[2] - padding)
    results["x"] = results["x"][:, *inside]
    return {name: results[name] for name in RESULTS[direction]}


def aligned(shape: Sequence[int]) -> np.ndarray:
    """Zeros as XLA would place them: at a multiple of 64 bytes."""
    memory = np.zeros(math.prod(shape) * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + math.prod(shape) * 4].view(np.float32).reshape(shape)


def random_arrays(layer: Layer, batch: int) -> dict[str, np.ndarray]:
    """Of a normal distribution, kernels of He's size."""
    rng = np.random.default_rng(0)
    arrays = {name: aligned(shape) for name, shape in layer.shapes(batch).items()}
    for array in arrays.values():
        array[...] = rng.standard_normal(array.shape, np.float32)
    arrays["kernel"] *= math.sqrt(2 / (9 * layer.inputs))
    return arrays


def largest_error(results: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """Of the largest value of its array."""
    return max(float(np.abs(results[name] - exact[name]).max() / np.abs(exact[name]).max()) for name in exact)


def measure(
    library: ctypes.CDLL, name: str, direction: str, batch: int, threads: Sequence[int], rounds: int
) -> Iterator[str]:
    """Rows of the table."""
    layer = LAYERS[name]
    arrays = random_arrays(layer, batch)
    exact = in_float64(direction, layer.padding, arrays)
    ours, theirs = (arrays | {result: aligned(arrays[result].shape) for result in exact} for _ in range(2))
    for number in threads:
        set_threads(number)
        run_ours, call = prepare_cpp(library, layer.algorithm, direction, layer.padding, ours, number)
        run_theirs = prepare_onednn(direction, layer.padding, theirs)
        times = [(seconds(run_theirs), seconds(run_ours), *call.seconds) for _ in range(rounds + 1)][1:]
        of_onednn, of_cpp, *parts = 1000 * np.median(times, axis=0)
        errors = (f"{largest_error(arrays, exact):.0e}" for arrays in (theirs, ours))
        cells = (
            *(name, direction, number, f"{of_onednn:.2f}", f"{of_cpp:.2f}", f"{of_onednn / of_cpp:.2f}"),
            *errors,
            " + ".join(f"{part:.1f}" for part in parts),
        )
        yield f"| {' | '.join(map(str, cells))} |"


def set_threads(number: int) -> None:
    """Of oneDNN in calls from this thread."""
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(c_int(number))


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# Both, a step.


def make_step(batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A training step of vgg_like, compiled with what convolutions are lowered to now; and its state."""
    graphdef, params = nnx.split(MODELS["vgg_like"](rngs=nnx.Rngs(0)))
    tx = optax.adam(1e-3, eps=1e-7)
    images = jax.random.normal(jax.random.key(1), (batch, 28, 28, 1))
    labels = jnp.arange(batch) % 10

    def step(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(graphdef, params)(images, train=True, rngs=nnx.Rngs(dropout=key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    state = params, tx.init(params)
    return jax.jit(step).lower(*state, jax.random.key(2)).compile(), state


def measure_step(batch: int, rounds: int) -> None:
    """Prints the times of a step with either, and how far apart the losses are."""
    runtime.keep_freed_memory()
    steps = [make_step(batch)]
    without = (mock.patch.object(module, "takes", lambda *_: False) for module in (winograd, direct))
    with next(without), next(without):
        jax.clear_caches()
        steps.append(make_step(batch))
    states: list[Any] = [state for _, state in steps]
    times, losses = [], []
    for i in range(rounds + 1):
        key, row, loss = jax.random.key(i), [], []
        for which, (step, _) in enumerate(steps):
            start = time.perf_counter()
            *states[which], value = jax.block_until_ready(step(*states[which], key))
            row.append(time.perf_counter() - start)
            loss.append(float(value))
        times.append(row)
        losses.append(loss)
    ours, of_onednn = 1000 * np.median(times[1:], axis=0)
    apart = [abs(a - b) / abs(a) for a, b in losses]
    print(
        f"vgg_like, batch {batch}, float32, {cgroup.usable_cores()} threads, medians of {rounds} steps in turns:"
    )
    print(f"oneDNN {of_onednn:.0f} ms, with C++ {ours:.0f} ms: ratio {of_onednn / ours:.2f}")
    print(f"losses apart by {apart[0]:.0e} in the first step, {apart[-1]:.0e} in the last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="conv4", help=f"of {','.join(LAYERS)}")
    parser.add_argument("--directions", default="forward", help=f"of {','.join(RESULTS)}")
    parser.add_argument("--threads", default="1,2", help="default: 1,2")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step", action="store_true", help="a whole training step of vgg_like instead")
    args = parser.parse_args()
    for names, known in ((args.layers, LAYERS), (args.directions, RESULTS)):
        if unknown := set(names.split(",")) - set(known):
            parser.error(f"there is no {', '.join(sorted(unknown))} among {', '.join(known)}")
    if onednn.library() is None:
        raise UserError(f"oneDNN cannot be loaded; install {onednn.PACKAGE}.")
    library = cpp.library()
    if library is None:
        raise UserError(f"there is no C++ here: {cpp.why_not()}.")
    if args.step:
        measure_step(args.batch, args.rounds)
        return
    print(HEADER)
    for name in args.layers.split(","):
        for direction in args.directions.split(","):
            threads = [int(number) for number in args.threads.split(",")]
            for row in measure(library, name, direction, args.batch, threads, args.rounds):
                print(row, flush=True)
    print(
        "\nparts of Winograd's, on the first thread: transforms before the products, products, transforms after."
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
