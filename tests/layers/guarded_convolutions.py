"""Convolutions in oneDNN of many kinds, with guard zones around all memory that oneDNN is given.

A program of its own, which test_onednn.py runs: what it looks for may crash it. Each convolution and its gradients
are compiled on one thread, executed on another, and compared with NumPy's.
"""

import concurrent.futures
import ctypes
import traceback
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from fmbench.layers import onednn, xla_ffi
from fmbench.layers.onednn import Window

GUARD, MARK = 1 << 16, 0xA5
NONE, ONE, TWO = ((0, 0), (0, 0)), ((1, 1), (1, 1)), ((2, 2), (2, 2))

# Shape of x, outputs, window. Threads share the pixels of one image where the batch is no multiple of theirs.
CASES = [
    ((5, 28, 28, 4), 4, Window((1, 1), (2, 2), NONE)),
    ((5, 14, 14, 8), 8, Window((1, 1), (2, 2), NONE)),
    ((1, 14, 14, 1), 12, Window((1, 1), (2, 2), NONE)),
    ((7, 6, 6, 12), 15, Window((1, 1), (1, 2), NONE)),
    ((1, 14, 14, 15), 4, Window((1, 1), (2, 1), NONE)),
    ((7, 6, 12, 5), 15, Window((1, 1), (3, 2), NONE)),
    ((5, 7, 7, 4), 4, Window((1, 1), (2, 2), NONE)),
    ((5, 7, 7, 3), 4, Window((1, 1), (2, 2), ONE)),  # by matrix products, on all CPUs; so is another one below
    ((3, 14, 14, 16), 33, Window((1, 1), (2, 2), NONE)),
    ((3, 13, 13, 33), 12, Window((3, 3), (1, 3), ONE)),
    ((5, 14, 14, 8), 16, Window((3, 3), (1, 1), ONE)),
    ((5, 13, 13, 3), 5, Window((5, 5), (2, 2), TWO)),
]

scratch: "list[GuardedMemory]" = []


class GuardedMemory(onednn._Memory):
    """Memory of oneDNN's in the middle of a larger buffer."""

    def __init__(self, desc, *, own=False):
        super().__init__(desc)
        size = onednn._onednn()._library.dnnl_memory_desc_get_size
        size.restype = ctypes.c_size_t
        self.size = size(desc)
        buffer = np.full(GUARD + self.size + GUARD, MARK, np.uint8)
        self.before, self.inner, self.after = np.split(buffer, [GUARD, GUARD + self.size])
        if own:
            self.inner[:] = 0xFF  # not a number
            scratch.append(self)
        address = ctypes.c_void_p(self.inner.ctypes.data)
        onednn._onednn().call("memory_set_data_handle", self.handle, address)

    def check(self):
        assert (self.before == MARK).all(), "written before its beginning"
        assert (self.after == MARK).all(), "written past its end"


def register(name, arguments, results, primitives):
    """`onednn._register`, with copies between XLA's buffers and guarded ones."""
    memories, addresses = [*arguments, *results], {}

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    def note(i, address):
        addresses[i] = address
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def run():
        try:
            for i, memory in enumerate(arguments):
                ctypes.memmove(memory.inner.ctypes.data, addresses[i], memory.size)
            for primitive in primitives:
                arguments_of = ctypes.c_int(len(primitive.arguments)), primitive.arguments
                onednn._onednn().call(
                    "primitive_execute", primitive.handle, onednn._onednn().stream, *arguments_of
                )
            for i, memory in enumerate(memories):
                ctypes.memmove(addresses[i], memory.inner.ctypes.data, memory.size)
            for memory in (*memories, *scratch):
                memory.check()
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    calls = [*((note, i, xla_ffi.Buffer(i)) for i in range(len(memories))), (run,)]
    return xla_ffi.register(name, len(arguments), len(results), calls)


def expected(window, x, kernel, bias, y_grad):
    """What `calls` returns, in float64."""
    x, kernel, bias, y_grad = (np.asarray(array, np.float64) for array in (x, kernel, bias, y_grad))
    padded = np.pad(x, ((0, 0), *window.padding, (0, 0)))
    rows, columns = (
        np.arange(size) * stride for size, stride in zip(y_grad.shape[1:3], window.strides, strict=True)
    )
    y, x_grad, kernel_grad = np.zeros_like(y_grad), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(window.size):
        seen = np.ix_(range(len(x)), rows + i, columns + j, range(x.shape[-1]))
        y += padded[seen] @ kernel[i, j]
        x_grad[seen] += y_grad @ kernel[i, j].T
        kernel_grad[i, j] = np.tensordot(padded[seen], y_grad, ([0, 1, 2], [0, 1, 2]))
    (top, _), (left, _) = window.padding
    x_grad = x_grad[:, top : top + x.shape[1], left : left + x.shape[2]]
    return np.maximum(y + bias, 0), y, x_grad, (kernel_grad, y_grad.sum((0, 1, 2))), kernel_grad


def calls(window, x, kernel, bias, y_grad):
    return (
        onednn.convolution(x, kernel, bias, window, relu=True),
        onednn.convolution(x, kernel, None, window),
        onednn.convolution_input_grad(y_grad, kernel, x.shape, window),
        onednn.convolution_kernel_grad(x, y_grad, window, use_bias=True),
        onednn.convolution_kernel_grad(x, y_grad, window, use_bias=False)[0],
    )


def check(shape, outputs, window, dtype, another_thread):
    rng = np.random.default_rng(0)
    y_shape = (shape[0], *window.output_size(*shape[1:3]), outputs)
    shapes = shape, (*window.size, shape[-1], outputs), (outputs,), y_shape
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    try:
        program = jax.jit(calls, static_argnums=0).lower(window, *arrays).compile()
    except onednn.UnimplementedError:
        assert dtype == jnp.bfloat16  # of which there is none on CPUs without AVX-512
        return
    right = jax.tree.leaves(expected(window, *arrays))
    for _ in range(3):
        results = jax.tree.leaves(another_thread.submit(program, *arrays).result())
        for actual, e in zip(results, right, strict=True):
            tolerance = (1e-5 if dtype == jnp.float32 else 2e-2) * np.abs(e).max()
            np.testing.assert_allclose(np.asarray(actual, np.float64), e, rtol=0, atol=tolerance)


def main():
    guarded = mock.patch.multiple(onednn, _Memory=GuardedMemory, _register=register)
    with guarded, concurrent.futures.ThreadPoolExecutor(1) as another_thread:
        for cases, dtype in ((CASES, jnp.float32), (CASES[::2], jnp.bfloat16)):
            for case in cases:
                try:
                    check(*case, dtype, another_thread)
                except Exception as error:
                    error.add_note(f"in {case}, {dtype.dtype}")
                    raise


if __name__ == "__main__":
    main()
