"""Convolutions of 3 x 3 by Winograd's F(4x4, 3x3), as XLA custom calls: a quarter of the multiplications.

winograd.cpp is built at first use, by the C++ compiler at hand, for this processor, and kept in the cache. On an AMD
EPYC it is 2 to 5 times as fast as oneDNN's direct convolution (docs/speed.md). Arrays are NHWC, kernels HWIO, float32.

References:
    Lavin & Gray, 2016, "Fast algorithms for convolutional neural networks".
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fmbench.layers import onednn, xla_ffi
from fmbench.layers.onednn import Window
from fmbench.system import files

SOURCE = Path(__file__).with_name("winograd.cpp")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
SUMMED = 32, 64, 128, 256, 512  # channels that a product may sum over
PANEL = 32  # of which the other channels are a multiple

ARRAYS = "x", "kernel", "bias", "y"


class Call(ctypes.Structure):
    """winograd.cpp's `Convolution`; of `threads` 0 are as many as OpenMP has."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "height", "width", "inputs", "outputs", "padding", "relu", "threads")),
        *((name, c_void_p) for name in ARRAYS),
        ("seconds", c_double * 3),
    )


class NoLibraryError(Exception):
    """It cannot be built here; the message says why."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built if it has to be; None where it cannot be."""
    try:
        return load()
    except NoLibraryError:
        return None


def why_not() -> str:
    """Why there is no library; '' where there is one."""
    if library() is not None:
        return ""
    try:
        load()
    except NoLibraryError as error:
        return str(error)
    return ""


def load() -> ctypes.CDLL:
    """Builds the library, if the cache does not have it, and loads it.

    Raises:
        NoLibraryError: If the processor has no AVX-512, or there is no compiler, or it fails.
    """
    processor = _processor()
    if "avx512f" not in processor.split():
        raise NoLibraryError("no AVX-512")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise NoLibraryError(f"no C++ compiler {os.environ.get('CXX') or 'g++'}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    made_of = "\0".join([SOURCE.read_text(), *OPTIONS, version, processor])
    path = files.cache_directory() / "layers" / f"winograd-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibraryError(f"{path}: {error.strerror or error}") from error


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    built = path.with_suffix(f".{os.getpid()}{files.UNFINISHED}")
    try:
        command = [compiler, *OPTIONS, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NoLibraryError(f"{compiler} fails: {(done.stderr.splitlines() or [''])[0]}")
        built.replace(path)  # who builds it at the same time builds the same
    finally:
        built.unlink(missing_ok=True)


def _processor() -> str:
    """What a program for this processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    names = {name.strip(): value.strip() for name, value in fields.items()}
    return f"{names.get('model name', '')} {names.get('flags', '')}"


def takes(window: Window, dtype: Any, inputs: int, outputs: int) -> bool:
    """Whether all three directions of such a convolution can run here, and so should."""
    padding = {side for sides in window.padding for side in sides}
    return (
        window.size == (3, 3)
        and window.strides == (1, 1)
        and len(padding) == 1
        and dtype == jnp.float32
        and inputs in SUMMED
        and outputs in SUMMED
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
    arrays: dict[str, jax.Array],
    results: dict[str, tuple[int, ...]],
    *,
    relu: bool = False,
) -> list[jax.Array]:
    numbers = (*x_shape, outputs, window.padding[0][0], int(relu))
    target = _register(direction, numbers, tuple(arrays), tuple(results))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results.values()]
    return jax.ffi.ffi_call(target, shapes)(*arrays.values())


@onednn.once
def _register(direction: str, numbers: tuple[int, ...], arrays: tuple[str, ...], results: tuple[str, ...]) -> str:
    """A custom call, one at a time of these and of oneDNN's, as they share the cores and the workspace."""
    loaded, mutex, libc = load(), onednn.mutex(), ctypes.CDLL(None)
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
    name = f"winograd.{direction}({', '.join(map(str, (*numbers, *arrays)))})"
    return xla_ffi.register(name, len(arrays), len(results), calls)
