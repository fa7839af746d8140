"""oneDNN's convolution as XLA custom calls.

oneDNN is the library in which PyTorch and TensorFlow convolve on CPUs. Its Linux wheel (PyPI: onednn-cpu-gomp) is
a shared library with a C interface; here it is bound with ctypes and called in place by XLA
(`fmbench.layers.xla_ffi`). Arrays are NHWC, kernels HWIO, as in Flax; float32 or bfloat16.

References:
    oneDNN developer guide and `oneapi/dnnl/dnnl_types.h`, version 3, from where the constants are.
"""

import ctypes
import functools
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp

from fmbench.layers import xla_ffi
from fmbench.system import cgroup

PACKAGE = "onednn-cpu-gomp"

CPU, IN_ORDER = 1, 1
UNIMPLEMENTED = 3
DATA_TYPES = {"bfloat16": 2, "float32": 3}
ANY_FORMAT = 1
FORWARD_TRAINING = 64
CONVOLUTION_DIRECT, RELU = 0x1, 0x20
SRC, DST, WEIGHTS, BIAS = 1, 17, 33, 41
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS = 129, 145, 161, 169
SCRATCHPAD, SCRATCHPAD_OF_USER = 80, 1
QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS, QUERY_SCRATCHPAD = 131, 132, 136

SIZE_OF_MUTEX = 40  # pthread_mutex_t of x86-64
LANES = 16  # channels that are computed together, of whatever use they are


_Function = TypeVar("_Function", bound=Callable[..., Any])
_making = threading.RLock()


class Window(NamedTuple):
    """The kernel of a convolution, and where it looks."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # ((top, bottom), (left, right))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = (
            (length + before + after - size) // stride + 1
            for length, (before, after), size, stride in zip(
                (height, width), self.padding, self.size, self.strides, strict=True
            )
        )
        return rows, columns

    def arguments(self) -> list[Any]:
        """Strides, dilation, padding before and after, as oneDNN takes them."""
        before, after = zip(*self.padding, strict=True)
        return [_int64s(self.strides), _int64s((0, 0)), _int64s(before), _int64s(after)]


class OneDNNError(Exception):
    """A call into oneDNN failed."""


class UnimplementedError(OneDNNError):
    """OneDNN has no such operation on this machine, as bfloat16 on CPUs without AVX-512."""


class _Library:
    """The loaded library with its one engine and stream."""

    def __init__(self, path: Path):
        # Two thread pools share the cores, XLA's and oneDNN's; an idle one must not spin. Read at load time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with cgroup.threads_within_quota("OMP_NUM_THREADS"):
            self._library = ctypes.CDLL(str(path))
        self._library.dnnl_primitive_desc_query_md.restype = c_void_p
        self.mutex = ctypes.create_string_buffer(SIZE_OF_MUTEX)  # of zeros: PTHREAD_MUTEX_INITIALIZER
        self.engine, self.stream = c_void_p(), c_void_p()
        self.call("engine_create", byref(self.engine), c_int(CPU), c_size_t(0))
        self.call("stream_create", byref(self.stream), self.engine, c_uint(IN_ORDER))

    def function(self, name: str) -> Any:
        return getattr(self._library, f"dnnl_{name}")

    def call(self, function: str, *arguments: Any) -> None:
        status = self.function(function)(*arguments)
        if status:
            error = UnimplementedError if status == UNIMPLEMENTED else OneDNNError
            raise error(f"dnnl_{function} returned status {status}")

    def new(self, function: str, *arguments: Any) -> c_void_p:
        """Calls a function whose first argument is the handle it makes."""
        handle = c_void_p()
        self.call(function, byref(handle), *arguments)
        return handle

    def query(self, primitive_desc: c_void_p, what: int) -> c_void_p:
        """A memory descriptor that a primitive has chosen."""
        return c_void_p(self._library.dnnl_primitive_desc_query_md(primitive_desc, c_int(what), c_int(0)))


def once(make: _Function) -> _Function:
    """`functools.cache` for programs that are lowered on several threads at once: none makes what another does."""
    cached = functools.cache(make)

    @functools.wraps(make)
    def locked(*arguments: Any) -> Any:
        with _making:
            return cached(*arguments)

    return cast("_Function", locked)


@functools.cache
def library() -> _Library | None:
    """oneDNN, or None where it is not installed or cannot be loaded, or where XLA refuses to call it."""
    return _load()


@once
def _load() -> _Library | None:
    try:
        files = importlib.metadata.files(PACKAGE) or []
        path = next(file.locate() for file in files if file.name == "libdnnl.so.3")
        loaded = _Library(Path(path))
        xla_ffi.register("onednn", 0, 0, [])  # by which XLA says whether it takes such handlers
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError):
        return None
    except xla_ffi.RefusedError as error:
        print(f"fmbench: convolutions stay in XLA, which cannot call oneDNN: {error}", file=sys.stderr)
        return None
    return loaded


def convolution(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, window: Window, *, relu: bool = False
) -> jax.Array:
    """Input (batch, height, width, inputs), kernel (*window.size, inputs, outputs), bias (outputs,) -> y."""
    bias = jnp.zeros(kernel.shape[-1]) if bias is None else bias
    batch, height, width, _ = x.shape
    shape = (batch, *window.output_size(height, width), kernel.shape[-1])
    pixels = _pixels_together(kernel.shape[-1], shape[2], window)
    if pixels > 1:
        together = Window((window.size[0], window.size[1] + pixels - 1), (1, pixels), window.padding)
        y = convolution(x, _side_by_side(kernel, pixels), jnp.tile(bias, pixels), together, relu=relu)
        return y.reshape(shape)
    target = _convolution(x.shape, kernel.shape, window, x.dtype.name, relu)
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, x.dtype))
    return call(x, kernel, bias.astype(jnp.float32))


def convolution_input_grad(
    y_grad: jax.Array, kernel: jax.Array, x_shape: tuple[int, ...], window: Window
) -> jax.Array:
    """The gradient with respect to x."""
    padding = [
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(window.size, window.padding, strict=True)
    ]
    if _pixels_together(kernel.shape[2], x_shape[2], window) > 1 and min(map(min, padding)) >= 0:
        mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
        return convolution(y_grad, mirrored, None, Window(window.size, window.strides, tuple(padding)))
    target = _convolution_input_grad(x_shape, kernel.shape, window, kernel.dtype.name)
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x_shape, kernel.dtype))(y_grad, kernel)


def convolution_kernel_grad(
    x: jax.Array, y_grad: jax.Array, window: Window, *, use_bias: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The gradients with respect to kernel and, if there is one, bias, in float32."""
    if window.size == (1, 1) and window.padding == ((0, 0), (0, 0)) and x.shape[-1] < LANES:
        # oneDNN copies the pixels that it strides to, but of few channels to wrong places: over what other threads
        # copied and past the end of the scratchpad (oneDNN#6035, in versions 3.2 to 3.12).
        x = x[:, :: window.strides[0], :: window.strides[1]]
        window = window._replace(strides=(1, 1))
    shape = (*window.size, x.shape[-1], y_grad.shape[-1])
    target = _convolution_kernel_grad(x.shape, shape, window, x.dtype.name, use_bias)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[-1:], jnp.float32)]
    kernel_grad, *bias_grad = jax.ffi.ffi_call(target, results[: 1 + use_bias])(x, y_grad)
    return kernel_grad, bias_grad[0] if use_bias else None


def _pixels_together(channels: int, width: int, window: Window) -> int:
    """How many neighbours of a row are computed as if they were one pixel, to fill the lanes.

    Without that a convolution to 4 channels takes as long as to 16. On a core, for 512x28x28 in float32, 4 -> 4
    takes 1.3 and not 2.5 ms, the gradient of 4 -> 32 with respect to the 4 takes 14 and not 20; in bfloat16 0.8
    and not 1.4, 8.7 and not 11.
    """
    if window.strides != (1, 1):
        return 1
    return max(pixels for pixels in range(1, max(LANES // channels, 1) + 1) if width % pixels == 0)


def _side_by_side(kernel: jax.Array, pixels: int) -> jax.Array:
    """The kernel that computes so many neighbours: (height, width + pixels - 1, inputs, pixels * outputs)."""
    shifted = [jnp.pad(kernel, ((0, 0), (i, pixels - 1 - i), (0, 0), (0, 0))) for i in range(pixels)]
    return jnp.concatenate(shifted, axis=-1)


def _int64s(values: Sequence[int]) -> ctypes.Array[c_int64]:
    return (c_int64 * len(values))(*values)


def _images(shape: Sequence[int], dtype: str) -> c_void_p:
    """Memory descriptor of an NHWC array; oneDNN counts the dimensions as NCHW whatever the layout."""
    n, h, w, c = shape
    return _strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype)


def _kernel(shape: Sequence[int], dtype: str) -> c_void_p:
    """Memory descriptor of an HWIO kernel; oneDNN counts OIHW."""
    h, w, i, o = shape
    return _strided((o, i, h, w), (1, o, w * i * o, i * o), dtype)


def _strided(dims: Sequence[int], strides: Sequence[int], dtype: str) -> c_void_p:
    arguments = c_int(len(dims)), _int64s(dims), c_int(DATA_TYPES[dtype]), _int64s(strides)
    return _onednn().new("memory_desc_create_with_strides", *arguments)


def _kernel_in_any_layout(shape: Sequence[int], dtype: str) -> c_void_p:
    h, w, i, o = shape
    arguments = c_int(4), _int64s((o, i, h, w)), c_int(DATA_TYPES[dtype]), c_int(ANY_FORMAT)
    return _onednn().new("memory_desc_create_with_tag", *arguments)


def mutex() -> ctypes.Array[Any]:
    """What a call holds: one runs at a time, as they share memories and cores."""
    return _onednn().mutex


def _onednn() -> _Library:
    loaded = library()
    if loaded is None:
        raise OneDNNError(f"oneDNN cannot be loaded; install {PACKAGE}")
    return loaded


class _Memory:
    """A buffer of XLA's, whose address comes with each call, or one of oneDNN's own."""

    def __init__(self, desc: c_void_p, *, own: bool = False):
        # oneDNN: -1 for memory that it allocates, 0 for an address to be given later.
        self.handle = _onednn().new("memory_create", desc, _onednn().engine, c_void_p(-1 if own else 0))


class _Argument(ctypes.Structure):
    _fields_ = (("index", c_int), ("memory", c_void_p))


class _Primitive:
    """An operation with the memory it works on, of which `desc` must leave the scratchpad to us."""

    def __init__(self, desc: c_void_p, memories: dict[int, _Memory]):
        self.handle = _onednn().new("primitive_create", desc)
        memories = memories | {SCRATCHPAD: _Memory(_onednn().query(desc, QUERY_SCRATCHPAD), own=True)}
        arguments = [_Argument(index, memory.handle) for index, memory in memories.items()]
        self.arguments = (_Argument * len(arguments))(*arguments)


def _reorder(source: _Memory, source_desc: c_void_p, target: _Memory, target_desc: c_void_p) -> _Primitive:
    engine, attributes = _onednn().engine, _attributes()
    desc = _onednn().new("reorder_primitive_desc_create", source_desc, engine, target_desc, engine, attributes)
    return _Primitive(desc, {SRC: source, DST: target})


def _register(
    name: str, arguments: Sequence[_Memory], results: Sequence[_Memory], primitives: Sequence[_Primitive]
) -> str:
    """A custom call that runs the primitives on XLA's buffers, one call at a time as they share the memories."""
    onednn, libc = _onednn(), ctypes.CDLL(None)
    place, execute, wait = map(onednn.function, ("memory_set_data_handle", "primitive_execute", "stream_wait"))
    calls = [
        (libc.pthread_mutex_lock, onednn.mutex),
        *((place, memory.handle, xla_ffi.Buffer(i)) for i, memory in enumerate((*arguments, *results))),
        *((execute, p.handle, onednn.stream, len(p.arguments), p.arguments) for p in primitives),
        (wait, onednn.stream),
        (libc.pthread_mutex_unlock, onednn.mutex),
    ]
    return xla_ffi.register(name, len(arguments), len(results), calls)


def _attributes(*, relu: bool = False) -> c_void_p:
    """Attributes of a primitive whose scratchpad is ours, and which may end in a ReLU.

    oneDNN's own scratchpads are, for some implementations, of the thread that creates the primitive; XLA executes
    it on others.
    """
    onednn = _onednn()
    attributes = onednn.new("primitive_attr_create")
    onednn.call("primitive_attr_set_scratchpad_mode", attributes, c_int(SCRATCHPAD_OF_USER))
    if relu:
        post_ops = onednn.new("post_ops_create")
        onednn.call("post_ops_append_eltwise", post_ops, c_int(RELU), c_float(0), c_float(0))
        onednn.call("primitive_attr_set_post_ops", attributes, post_ops)
    return attributes


class _ConvolutionDescs(NamedTuple):
    x: c_void_p
    kernel: c_void_p
    bias: c_void_p
    y: c_void_p
    forward: c_void_p


def _convolution_descs(
    x_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    window: Window,
    dtype: str,
    relu: bool = False,
) -> _ConvolutionDescs:
    onednn = _onednn()
    x = _images(x_shape, dtype)
    kernel = _kernel_in_any_layout(kernel_shape, dtype)
    bias = _strided((kernel_shape[-1],), (1,), "float32")
    y = _images((x_shape[0], *window.output_size(*x_shape[1:3]), kernel_shape[-1]), dtype)
    forward = onednn.new(
        "convolution_forward_primitive_desc_create",
        onednn.engine,
        c_int(FORWARD_TRAINING),
        c_int(CONVOLUTION_DIRECT),
        x,
        kernel,
        bias,
        y,
        *window.arguments(),
        _attributes(relu=relu),
    )
    return _ConvolutionDescs(x, kernel, bias, y, forward)


@once
def _convolution(
    x_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    window: Window,
    dtype: str,
    relu: bool,
) -> str:
    descs = _convolution_descs(x_shape, kernel_shape, window, dtype, relu)
    kernel_desc = _kernel(kernel_shape, dtype)
    blocked_desc = _onednn().query(descs.forward, QUERY_WEIGHTS)
    x, kernel, bias, y = map(_Memory, (descs.x, kernel_desc, descs.bias, descs.y))
    blocked = _Memory(blocked_desc, own=True)
    primitives = [
        _reorder(kernel, kernel_desc, blocked, blocked_desc),
        _Primitive(descs.forward, {SRC: x, WEIGHTS: blocked, BIAS: bias, DST: y}),
    ]
    name = _name("convolution", x_shape, kernel_shape, window, dtype, relu)
    return _register(name, [x, kernel, bias], [y], primitives)


@once
def _convolution_input_grad(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], window: Window, dtype: str
) -> str:
    onednn = _onednn()
    descs = _convolution_descs(x_shape, kernel_shape, window, dtype)
    backward = onednn.new(
        "convolution_backward_data_primitive_desc_create",
        onednn.engine,
        c_int(CONVOLUTION_DIRECT),
        descs.x,
        descs.kernel,
        descs.y,
        *window.arguments(),
        descs.forward,
        _attributes(),
    )
    kernel_desc = _kernel(kernel_shape, dtype)
    blocked_desc = onednn.query(backward, QUERY_WEIGHTS)
    x_grad, kernel, y_grad = map(_Memory, (descs.x, kernel_desc, descs.y))
    blocked = _Memory(blocked_desc, own=True)
    primitives = [
        _reorder(kernel, kernel_desc, blocked, blocked_desc),
        _Primitive(backward, {DIFF_DST: y_grad, WEIGHTS: blocked, DIFF_SRC: x_grad}),
    ]
    name = _name("convolution_input_grad", x_shape, kernel_shape, window, dtype)
    return _register(name, [y_grad, kernel], [x_grad], primitives)


@once
def _convolution_kernel_grad(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], window: Window, dtype: str, use_bias: bool
) -> str:
    onednn = _onednn()
    descs = _convolution_descs(x_shape, kernel_shape, window, dtype)
    backward = onednn.new(
        "convolution_backward_weights_primitive_desc_create",
        onednn.engine,
        c_int(CONVOLUTION_DIRECT),
        descs.x,
        _kernel_in_any_layout(kernel_shape, "float32"),
        descs.bias if use_bias else None,
        descs.y,
        *window.arguments(),
        descs.forward,
        _attributes(),
    )
    kernel_desc = _kernel(kernel_shape, "float32")
    blocked_desc = onednn.query(backward, QUERY_DIFF_WEIGHTS)
    x, y_grad, kernel_grad, bias_grad = map(_Memory, (descs.x, descs.y, kernel_desc, descs.bias))
    blocked = _Memory(blocked_desc, own=True)
    for_bias = {DIFF_BIAS: bias_grad} if use_bias else {}
    primitives = [
        _Primitive(backward, {SRC: x, DIFF_DST: y_grad, DIFF_WEIGHTS: blocked} | for_bias),
        _reorder(blocked, blocked_desc, kernel_grad, kernel_desc),
    ]
    name = _name("convolution_kernel_grad", x_shape, kernel_shape, window, dtype, use_bias)
    return _register(name, [x, y_grad], [kernel_grad, *for_bias.values()], primitives)


def _name(operation: str, *settings: Any) -> str:
    """One name for one set of settings: a program from the compile cache finds its custom calls by name."""
    return f"onednn.{operation}({', '.join(map(str, settings))})"
