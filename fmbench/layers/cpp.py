"""What is in C++ beside this file, as XLA custom calls: convolutions of 3 x 3, max-pooling's gradient, batch norm.

It is built at first use, by the C++ compiler at hand, for this processor, which has AVX-512 or AVX2, and kept in
the cache. Arrays are NHWC, kernels HWIO, all float32; strides of convolutions are 1, and padding is the same on
all sides.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmbench.errors import UserError
from fmbench.layers import onednn, xla_ffi
from fmbench.layers.onednn import Window
from fmbench.system import files

NAME = "C++ layers"  # in a record's versions, with the compiler
SOURCES = [Path(__file__).with_name(f"{name}.cpp") for name in ("winograd", "direct", "pooling", "batch_norm")]
HEADER = Path(__file__).with_name("convolution.h")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
ARRAYS = "x", "kernel", "bias", "y"  # of a convolution
LANES = 16  # floats of the longest vector
WINDOWS = 2, 3  # sides of those that pooling.cpp has code for


class Convolution(ctypes.Structure):
    """convolution.h's; of `threads` 0 are as many as OpenMP has."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "height", "width", "inputs", "outputs")),
        *((name, c_int64) for name in ("padding", "relu", "threads")),
        *((name, c_void_p) for name in ARRAYS),
        ("seconds", c_double * 3),
    )


class Pooling(ctypes.Structure):
    """pooling.cpp's."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "height", "width", "channels", "size", "threads")),
        *((name, c_void_p) for name in ("x", "y_grad", "x_grad")),
    )


class BatchNorm(ctypes.Structure):
    """batch_norm.cpp's."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "channels", "relu")),
        ("epsilon", c_double),
        ("threads", c_int64),
        *((name, c_void_p) for name in ("x", "scale", "bias", "y", "mean", "variance")),
        *((name, c_void_p) for name in ("y_grad", "x_grad", "scale_grad", "bias_grad")),
    )


class _Built(NamedTuple):
    library: ctypes.CDLL | None
    compiler: str  # as it calls itself
    why_not: str  # '' where there is a library


def library() -> ctypes.CDLL | None:
    """The library, built if the cache does not have it; None where it cannot be."""
    return _load().library


def compiler() -> str:
    """Of the library: 'g++ (Debian 12.2.0-14) 12.2.0'."""
    return _load().compiler


def why_not() -> str:
    """Why there is no library, in a few words; '' where there is one."""
    return _load().why_not


@onednn.once
def _load() -> _Built:
    processor = _processor()
    flags = set(processor.split())
    if "avx512f" not in flags and not {"avx2", "fma"} <= flags:  # the vectors of convolution.h
        return _Built(None, "", "neither AVX-512 nor AVX2 with FMA")
    if onednn.library() is None:  # nor can XLA call this one, then
        return _Built(None, "", "no oneDNN")
    command = os.environ.get("CXX") or "g++"
    if shutil.which(command) is None:
        return _Built(None, "", f"no C++ compiler {command}")
    try:
        version = _first_line(_output(command, "--version"))
        texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
        made_of = "\0".join([*texts, *OPTIONS, version, processor])
        name = f"layers-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
        path = files.cache_directory() / "layers" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            built = path.with_suffix(f".{os.getpid()}{files.UNFINISHED}")
            _output(command, *OPTIONS, *map(str, SOURCES), "-o", str(built))
            files.sync(built)
            built.replace(path)  # who builds it at the same time builds the same
        return _Built(ctypes.CDLL(str(path)), version, "")
    except (OSError, UserError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return _Built(None, "", f"{command} cannot build what is in {HEADER.parent}: {_first_line(said)}")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "it says nothing")


def _processor() -> str:
    """What a program for this processor depends on, flags among it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    first = lines[: lines.index("")] if "" in lines else lines
    return " ".join(line.partition(":")[2] for line in first if line.startswith(("model name", "flags")))


def suits(window: Window, dtype: Any) -> bool:
    """Whether convolutions of such a window and dtype can be in C++, some number of channels provided."""
    padding = {side for sides in window.padding for side in sides}
    plain = window.size == (3, 3) and window.strides == (1, 1) and len(padding) == 1
    return plain and dtype == jnp.float32 and library() is not None


def convolution(
    algorithm: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, window: Window, *, relu: bool = False
) -> jax.Array:
    """As `onednn.convolution`."""
    shape = (x.shape[0], *window.output_size(*x.shape[1:3]), kernel.shape[3])
    arrays = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    return _call(f"{algorithm}_forward", x.shape, shape[3], window, arrays, {"y": shape}, relu=relu)[0]


def convolution_input_grad(
    algorithm: str, y_grad: jax.Array, kernel: jax.Array, x_shape: tuple[int, ...], window: Window
) -> jax.Array:
    """As `onednn.convolution_input_grad`."""
    arrays = {"y": y_grad, "kernel": kernel}
    return _call(f"{algorithm}_input_grad", x_shape, kernel.shape[3], window, arrays, {"x": x_shape})[0]


def convolution_kernel_grad(
    algorithm: str, x: jax.Array, y_grad: jax.Array, window: Window, *, use_bias: bool
) -> tuple[jax.Array, jax.Array | None]:
    """As `onednn.convolution_kernel_grad`."""
    outputs = y_grad.shape[3]
    results = {"kernel": (3, 3, x.shape[3], outputs)} | ({"bias": (outputs,)} if use_bias else {})
    arrays = {"x": x, "y": y_grad}
    kernel_grad, *bias_grad = _call(f"{algorithm}_kernel_grad", x.shape, outputs, window, arrays, results)
    return kernel_grad, bias_grad[0] if use_bias else None


def _call(
    function: str,
    x_shape: Sequence[int],
    outputs: int,
    window: Window,
    arrays: Mapping[str, jax.Array],
    results: Mapping[str, tuple[int, ...]],
    *,
    relu: bool = False,
) -> Sequence[jax.Array]:
    numbers = (*x_shape, outputs, window.padding[0][0], int(relu))
    return _run(function, Convolution, numbers, arrays, results)


def suits_max_pool(x: Any, _: Any, *, size: int) -> bool:
    """Whether `max_pool_grad` takes such an x."""
    return x.dtype == jnp.float32 and x.size > 0 and x.shape[3] % LANES == 0 and size in WINDOWS


def max_pool_grad(x: jax.Array, y_grad: jax.Array, *, size: int) -> Sequence[jax.Array]:
    """The gradient of max-pooling with respect to x, by windows of `size` x `size`, which is their stride."""
    arrays = {"x": x, "y_grad": y_grad}
    return _run("pooling_grad", Pooling, (*x.shape, size), arrays, {"x_grad": x.shape})


def suits_batch_norm(x: Any, *_: Any, epsilon: float, relu: bool) -> bool:
    """Whether `batch_norm` and `batch_norm_grad` take such an x, (..., channels), and what goes with it."""
    del epsilon, relu
    channels = x.shape[-1]
    fits = channels % LANES == 0 or (LANES % channels == 0 and x.size % LANES == 0)
    return x.dtype == jnp.float32 and x.size > 0 and fits


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, relu: bool
) -> Sequence[jax.Array]:
    """y, with a ReLU if so asked, and the mean and the variance of each channel."""
    arrays = {"x": x, "scale": scale, "bias": bias}
    results = {"y": x.shape, "mean": scale.shape, "variance": scale.shape}
    return _run("batch_norm_forward", BatchNorm, _sizes(x, epsilon, relu), arrays, results)


def batch_norm_grad(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    y: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    y_grad: jax.Array,
    *,
    epsilon: float,
    relu: bool,
) -> Sequence[jax.Array]:
    """The gradients with respect to x, scale and bias."""
    del y  # whose sign follows from the others, of which fewer bytes are read
    arrays = {"x": x, "scale": scale, "bias": bias, "mean": mean, "variance": variance, "y_grad": y_grad}
    results = {"x_grad": x.shape, "scale_grad": scale.shape, "bias_grad": scale.shape}
    return _run("batch_norm_backward", BatchNorm, _sizes(x, epsilon, relu), arrays, results)


def _sizes(x: jax.Array, epsilon: float, relu: bool) -> tuple[float, ...]:
    return x.size // x.shape[-1], x.shape[-1], int(relu), epsilon


def _run(
    function: str,
    kind: type[ctypes.Structure],
    numbers: tuple[float, ...],
    arrays: Mapping[str, jax.Array],
    results: Mapping[str, tuple[int, ...]],
) -> Sequence[jax.Array]:
    target = _register(function, kind, numbers, tuple(arrays), tuple(results))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results.values()]
    return jax.ffi.ffi_call(target, shapes)(*arrays.values())


@onednn.once
def _register(
    function: str,
    kind: type[ctypes.Structure],
    numbers: tuple[float, ...],
    arrays: tuple[str, ...],
    results: tuple[str, ...],
) -> str:
    """A custom call, one at a time of these and of oneDNN's, as they share the cores and the workspace."""
    loaded, mutex, libc = library(), onednn.mutex(), ctypes.CDLL(None)
    assert loaded is not None  # `suits` has looked
    call = kind(*numbers)
    slots = (c_void_p.from_buffer(call, getattr(kind, name).offset) for name in (*arrays, *results))
    calls = [
        (libc.pthread_mutex_lock, mutex),
        *((loaded.place, ctypes.pointer(slot), xla_ffi.Buffer(i)) for i, slot in enumerate(slots)),
        (getattr(loaded, function), ctypes.pointer(call)),
        (libc.pthread_mutex_unlock, mutex),
    ]
    name = f"{function}({', '.join(map(str, (*numbers, *arrays, *results)))})"
    return xla_ffi.register(name, len(arrays), len(results), calls)
