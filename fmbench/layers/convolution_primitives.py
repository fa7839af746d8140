"""Convolution and its two gradients as primitives of JAX: oneDNN's on CPUs, XLA's elsewhere.

The three are linear in each of their arrays, and the derivatives of each are made of the other two. So derivatives
of every order and mode, and `jax.checkpoint`, stay within them; `jax.vmap` does where it maps over images alone,
and takes XLA's convolution where it doesn't.

Where they run is decided when a program is lowered. XLA's convolution is taken for other platforms than CPUs, by
`jax.export` (whose programs may run where no oneDNN is), for empty arrays, where oneDNN has no implementation, and
in inference, which is where nothing is differentiated, if it was measured to be the faster.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fmbench.layers import direct, onednn, winograd
from fmbench.layers.onednn import Window
from fmbench.layers.sharding import vary_alike

SMALL = 6_000_000  # multiplications for one image
FEW_INPUTS = 64  # channels


def convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, window: Window, relu: bool) -> jax.Array:
    """Convolves, adds the bias and, if so asked, applies a ReLU.

    Args:
        x: (batch, height, width, inputs), float32 or bfloat16.
        kernel: (*window.size, inputs, outputs), of the same dtype.
        bias: (outputs,), of the same dtype, or None.
        window: Strides and padding.
        relu: Whether a ReLU follows.

    Returns:
        (batch, height, width, outputs), of the same dtype.
    """
    arrays = vary_alike(*((x, kernel) if bias is None else (x, kernel, bias)))
    return convolution_p.bind(*arrays, window=window, relu=relu, inference=True)[0]


def _bind(*arrays: jax.Array, window: Window, relu: bool = False) -> list[jax.Array]:
    """Convolution as a part of derivatives."""
    return convolution_p.bind(*arrays, window=window, relu=relu, inference=False)


def is_faster_in_xla(x: jax.Array, kernel: jax.Array, window: Window) -> bool:
    """Whether inference convolves faster in XLA than in a library, by the tables in docs/speed.md.

    Alone XLA's convolution never is the faster, but it fuses with what comes before and after it, and its threads
    need not be woken. It copies images that are padded.
    """
    batch, height, width, inputs = x.shape
    y_shape = batch, *window.output_size(height, width)
    if batch == 1:
        return math.prod(y_shape) * kernel.size <= SMALL
    if winograd.takes(window, x.dtype, y_shape, kernel.shape[2:]):
        return False
    return x.dtype == jnp.float32 and inputs <= FEW_INPUTS and not any(map(any, window.padding))


def _library(window: Window, dtype: Any, y_shape: Sequence[int], channels: Sequence[int]) -> Any:
    """The module that convolves, of three with the same functions; the arguments are those of `winograd.takes`."""
    ours = (module for module in (winograd, direct) if module.takes(window, dtype, y_shape, channels))
    return next(ours, onednn)


def _convolution_in_library(x, kernel, bias=None, *, window, relu, inference):
    del inference
    y_shape = x.shape[0], *window.output_size(*x.shape[1:3])
    library = _library(window, x.dtype, y_shape, kernel.shape[2:])
    return [library.convolution(x, kernel, bias, window, relu=relu)]


def _convolution_in_xla(x, kernel, bias=None, *, window, relu, inference):
    del inference
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        kept_apart(x), kernel, window.strides, window.padding, dimension_numbers=layout
    )
    y = y if bias is None else y + bias
    return [jax.nn.relu(y) if relu else y]


def kept_apart(x: jax.Array) -> jax.Array:
    """x, which XLA on CPUs then does not fuse with the convolution that follows, if it is bfloat16.

    A fusion by XLA on CPUs (YNNPACK, jax 0.12) of max-pooling, ReLU, convolution and ReLU in bfloat16 gives wrong
    numbers, NaN among them.
    """
    if x.dtype != jnp.bfloat16:
        return x
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _input_grad_in_library(y_grad, kernel, *, size, window):
    shape = (y_grad.shape[0], *size, kernel.shape[2])
    library = _library(window, y_grad.dtype, y_grad.shape[:3], kernel.shape[2:])
    return [library.convolution_input_grad(y_grad, kernel, shape, window)]


def _input_grad_in_xla(y_grad, kernel, *, size, window):
    padding = [
        (side - 1 - before, length + before - 1 - (outputs - 1) * stride)
        for length, outputs, side, stride, (before, _) in _by_axis(size, y_grad.shape[1:3], window)
    ]
    return [
        jax.lax.conv_general_dilated(
            *(kept_apart(y_grad), kernel[::-1, ::-1], (1, 1), padding),
            lhs_dilation=window.strides,
            dimension_numbers=("NHWC", "HWOI", "NHWC"),
        )
    ]


def _kernel_grad_in_library(x, y_grad, *, window, use_bias):
    library = _library(window, x.dtype, y_grad.shape[:3], (x.shape[-1], y_grad.shape[-1]))
    kernel_grad, bias_grad = library.convolution_kernel_grad(x, y_grad, window, use_bias=use_bias)
    grads = [kernel_grad] if bias_grad is None else [kernel_grad, bias_grad]
    return [grad.astype(x.dtype) for grad in grads]


def _kernel_grad_in_xla(x, y_grad, *, window, use_bias):
    padding = [
        (before, side - length - before + (outputs - 1) * stride)
        for length, outputs, side, stride, (before, _) in _by_axis(x.shape[1:3], y_grad.shape[1:3], window)
    ]
    if 0 in y_grad.shape[1:3]:  # which XLA takes for no window
        kernel_grad = jnp.zeros((*window.size, x.shape[-1], y_grad.shape[-1]), x.dtype)
    else:
        kernel_grad = jax.lax.conv_general_dilated(
            *(kept_apart(x), y_grad, (1, 1), padding),
            rhs_dilation=window.strides,
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
        )
    return [kernel_grad, y_grad.sum((0, 1, 2))] if use_bias else [kernel_grad]


def _by_axis(size: Sequence[int], output_size: Sequence[int], window: Window):
    return zip(size, output_size, window.size, window.strides, window.padding, strict=True)


def _primitive(name: str, in_library: Callable, in_xla: Callable) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True

    @functools.cache
    def compiled(**params: Any) -> Callable:
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.def_impl(lambda *arrays, **params: compiled(**params)(*arrays))
    primitive.def_abstract_eval(
        lambda *avals, **params: jax.make_jaxpr(functools.partial(in_xla, **params))(*avals).out_avals
    )
    lower_to_library, lower_to_xla = (mlir.lower_fun(f, multiple_results=True) for f in (in_library, in_xla))

    def lower_on_cpu(context: mlir.LoweringRuleContext, *arrays: Any, **params: Any) -> Any:
        empty = any(0 in aval.shape for aval in (*context.avals_in, *context.avals_out))
        exported = context.module_context.lowering_parameters.for_export
        x, kernel, *_ = cast("Sequence[Any]", context.avals_in)
        infers = params.get("inference", False)
        if empty or exported or (infers and is_faster_in_xla(x, kernel, params["window"])):
            return lower_to_xla(context, *arrays, **params)
        try:
            return lower_to_library(context, *arrays, **params)
        except onednn.UnimplementedError:
            return lower_to_xla(context, *arrays, **params)

    mlir.register_lowering(primitive, lower_to_xla)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")

    def batch(arrays: Sequence[jax.Array], axes: Sequence[int | None], **params: Any) -> tuple[list, list[int]]:
        images, *others = arrays
        if axes[0] is None or axes[1:] != (None,) * len(others) or primitive is kernel_grad_p:
            results = jax.vmap(functools.partial(in_xla, **params), in_axes=tuple(axes))(*arrays)
        else:  # more images under the same kernel
            images = jnp.moveaxis(images, axes[0], 0)
            outer = images.shape[:2]
            (result,) = primitive.bind(images.reshape(-1, *images.shape[2:]), *others, **params)
            results = [result.reshape(*outer, *result.shape[1:])]
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batch
    return primitive


convolution_p = _primitive("convolution", _convolution_in_library, _convolution_in_xla)
input_grad_p = _primitive("convolution_input_grad", _input_grad_in_library, _input_grad_in_xla)
kernel_grad_p = _primitive("convolution_kernel_grad", _kernel_grad_in_library, _kernel_grad_in_xla)


def _is_zero(array: Any) -> bool:
    return array is None or isinstance(array, ad.Zero)


def _convolved(x: Any, kernel: Any, bias: Any, window: Window) -> list[Any]:
    """Convolution with a kernel and a bias of which either may be zero; nothing if both are."""
    if not _is_zero(kernel):
        arrays = (x, kernel) if _is_zero(bias) else (x, kernel, bias)
        return _bind(*arrays, window=window)
    if _is_zero(bias):
        return []
    size = window.output_size(*x.shape[1:3])
    return [jnp.broadcast_to(bias, (x.shape[0], *size, bias.shape[0]))]


def _sum(terms: list[Any], array: jax.Array) -> Any:
    """The sum of tangents of the array, of which there may be none."""
    return functools.reduce(jnp.add, terms) if terms else ad.Zero(jax.typeof(array).to_tangent_aval())


def _convolution_jvp(arrays, tangents, *, window, relu, inference):
    del inference  # that it is not
    (y,) = _bind(*arrays, window=window, relu=relu)
    x, kernel, *_ = arrays
    x_tangent, kernel_tangent, bias_tangent = (*tangents, None)[:3]
    terms = [] if _is_zero(x_tangent) else _bind(x_tangent, kernel, window=window)
    terms += _convolved(x, kernel_tangent, bias_tangent, window)
    tangent = _sum(terms, y)
    return [y], [jnp.where(y > 0, tangent, 0) if relu and not _is_zero(tangent) else tangent]


def _convolution_transpose(cotangents, x, kernel, *bias, window, relu, inference):
    del relu, inference  # only linear ones are transposed
    (y_grad,) = cotangents
    grads: list[Any] = [None] * (2 + len(bias))
    if _is_zero(y_grad):
        return grads
    if ad.is_undefined_primal(x):
        grads[:1] = input_grad_p.bind(y_grad, kernel, size=x.aval.shape[1:3], window=window)
    else:
        of_kernel_and_bias = kernel_grad_p.bind(x, y_grad, window=window, use_bias=bool(bias))
        grads[1:] = [
            grad if ad.is_undefined_primal(array) else None
            for grad, array in zip(of_kernel_and_bias, (kernel, *bias), strict=True)
        ]
    return grads


def _input_grad_jvp(arrays, tangents, **params):
    outputs = input_grad_p.bind(*arrays, **params)
    (y_grad, kernel), (y_grad_tangent, kernel_tangent) = arrays, tangents
    terms = []
    if not _is_zero(y_grad_tangent):
        terms += input_grad_p.bind(y_grad_tangent, kernel, **params)
    if not _is_zero(kernel_tangent):
        terms += input_grad_p.bind(y_grad, kernel_tangent, **params)
    return outputs, [_sum(terms, outputs[0])]


def _input_grad_transpose(cotangents, y_grad, kernel, *, size, window):
    del size
    (x,) = cotangents
    if _is_zero(x):
        return [None, None]
    if ad.is_undefined_primal(y_grad):
        return [*_bind(x, kernel, window=window), None]
    return [None, *kernel_grad_p.bind(x, y_grad, window=window, use_bias=False)]


def _kernel_grad_jvp(arrays, tangents, *, window, use_bias):
    outputs = kernel_grad_p.bind(*arrays, window=window, use_bias=use_bias)
    (x, y_grad), (x_tangent, y_grad_tangent) = arrays, tangents
    terms = []
    if not _is_zero(x_tangent):  # on which the bias's gradient doesn't depend
        terms.append(kernel_grad_p.bind(x_tangent, y_grad, window=window, use_bias=False))
    if not _is_zero(y_grad_tangent):
        terms.append(kernel_grad_p.bind(x, y_grad_tangent, window=window, use_bias=use_bias))
    by_output = itertools.zip_longest(outputs, *terms)
    return outputs, [_sum([part for part in parts if part is not None], output) for output, *parts in by_output]


def _kernel_grad_transpose(cotangents, x, y_grad, *, window, use_bias):
    del use_bias  # which says how many cotangents there are
    kernel, bias = (*cotangents, None)[:2]
    if ad.is_undefined_primal(x):
        if _is_zero(kernel):
            return [None, None]
        return [*input_grad_p.bind(y_grad, kernel, size=x.aval.shape[1:3], window=window), None]
    return [None, *(_convolved(x, kernel, bias, window) or [None])]


ad.primitive_jvps[convolution_p] = _convolution_jvp
ad.primitive_jvps[input_grad_p] = _input_grad_jvp
ad.primitive_jvps[kernel_grad_p] = _kernel_grad_jvp
ad.primitive_transposes[convolution_p] = _convolution_transpose
ad.primitive_transposes[input_grad_p] = _input_grad_transpose
ad.primitive_transposes[kernel_grad_p] = _kernel_grad_transpose
