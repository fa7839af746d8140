"""Convolutions of 3 x 3 by Winograd's F(4x4, 3x3), as XLA custom calls: a quarter of the multiplications.

winograd.cpp is built at first use, by the C++ compiler at hand, for this processor, and kept in the cache. On an
AMD EPYC it is 1.3 to 5 times as fast as oneDNN's direct convolution (docs/speed.md). Arrays are NHWC, kernels
HWIO, all float32.

References:
    Lavin & Gray, 2016, "Fast algorithms for convolutional neural networks".
"""

import ctypes
import hashlib
import math
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

NAME = "winograd.cpp"  # in a record's versions, with the compiler
SOURCE = Path(__file__).with_name(NAME)
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
TILE = 4  # pixels of the result on a side
LEAST_TILES = 64  # for fewer the transform of the kernel takes longer than they save
SUMMED = 32, 64, 128, 256, 512  # channels that a product may sum over
NUMBERS = "batch", "height", "width", "inputs", "outputs", "padding", "relu", "threads"
ARRAYS = "x", "kernel", "bias", "y"


class Call(ctypes.Structure):
    """winograd.cpp's `Convolution`; of `threads` 0 are as many as OpenMP has."""

    _fields_ = (
        *((name, c_int64) for name in NUMBERS),
        *((name, c_void_p) for name in ARRAYS),
        ("seconds", c_double * 3),
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
    if "avx512f" not in processor.split():  # without it the registers are too few and too short
        return _Built(None, "", "no AVX-512")
    command = os.environ.get("CXX") or "g++"
    if shutil.which(command) is None:
        return _Built(None, "", f"no C++ compiler {command}")
    try:
        version = _first_line(_output(command, "--version"))
        made_of = "\0".join([SOURCE.read_text(encoding="utf-8"), *OPTIONS, version, processor])
        name = f"winograd-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
        path = files.cache_directory() / "layers" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            built = path.with_suffix(f".{os.getpid()}{files.UNFINISHED}")
            _output(command, *OPTIONS, str(SOURCE), "-o", str(built))
            files.sync(built)
            built.replace(path)  # who builds it at the same time builds the same
        return _Built(ctypes.CDLL(str(path)), version, "")
    except (OSError, UserError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return _Built(None, "", f"{command} cannot build {NAME}: {_first_line(said)}")


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


def takes(window: Window, dtype: Any, y_shape: Sequence[int], channels: Sequence[int]) -> bool:
    """Whether all three directions of such a convolution can run here, and so should.

    Args:
        window: Of the convolution.
        dtype: Of its arrays.
        y_shape: (batch, height, width) of its result.
        channels: Its inputs and outputs.
    """
    batch, height, width = y_shape
    tiles = batch * math.ceil(height / TILE) * math.ceil(width / TILE)
    padding = {side for sides in window.padding for side in sides}
    return (
        window.size == (3, 3)
        and window.strides == (1, 1)
        and len(padding) == 1
        and dtype == jnp.float32
        and tiles >= LEAST_TILES
        and all(number in SUMMED for number in channels)
        and library() is not None
    )


def convolution(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, window: Window, *, relu: bool = False
) -> jax.Array:
    """As `onednn.convolution`."""
    shape = (x.shape[0], *window.output_size(*x.shape[1:3]), kernel.shape[3])
    arrays = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    return _call("forward", x.shape, shape[3], window, arrays, {"y": shape}, relu=relu)[0]


def convolution_input_grad(
    y_grad: jax.Array, kernel: jax.Array, x_shape: tuple[int, ...], window: Window
) -> jax.Array:
    """As `onednn.convolution_input_grad`."""
    arrays = {"y": y_grad, "kernel": kernel}
    return _call("input_grad", x_shape, kernel.shape[3], window, arrays, {"x": x_shape})[0]


def convolution_kernel_grad(
    x: jax.Array, y_grad: jax.Array, window: Window, *, use_bias: bool
) -> tuple[jax.Array, jax.Array | None]:
    """As `onednn.convolution_kernel_grad`."""
    outputs = y_grad.shape[3]
    results = {"kernel": (3, 3, x.shape[3], outputs)} | ({"bias": (outputs,)} if use_bias else {})
    kernel_grad, *bias_grad = _call("kernel_grad", x.shape, outputs, window, {"x": x, "y": y_grad}, results)
    return kernel_grad, bias_grad[0] if use_bias else None


def _call(
    direction: str,
    x_shape: Sequence[int],
    outputs: int,
    window: Window,
    arrays: Mapping[str, jax.Array],
    results: Mapping[str, tuple[int, ...]],
    *,
    relu: bool = False,
) -> Sequence[jax.Array]:
    numbers = (*x_shape, outputs, window.padding[0][0], int(relu))
    target = _register(direction, numbers, tuple(arrays), tuple(results))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results.values()]
    return jax.ffi.ffi_call(target, shapes)(*arrays.values())


@onednn.once
def _register(direction: str, numbers: tuple[int, ...], arrays: tuple[str, ...], results: tuple[str, ...]) -> str:
    """A custom call, one at a time of these and of oneDNN's, as they share the cores and the workspace."""
    loaded, mutex, libc = library(), onednn.mutex(), ctypes.CDLL(None)
    assert loaded is not None  # `takes` has looked
    call = ctypes.pointer(Call(*numbers))
    calls = [
        (libc.pthread_mutex_lock, mutex),
        *(
            (loaded.winograd_place, call, xla_ffi.Buffer(i), ARRAYS.index(name))
            for i, name in enumerate((*arrays, *results))
        ),
        (getattr(loaded, f"winograd_{direction}"), call),
        (libc.pthread_mutex_unlock, mutex),
    ]
    name = f"winograd.{direction}({', '.join(map(str, (*numbers, *arrays, *results)))})"
    return xla_ffi.register(name, len(arrays), len(results), calls)
