"""Convolution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fmbench.layers import onednn
from fmbench.layers.onednn import Window


class Conv(nnx.Conv):
    """`nnx.Conv` of two dimensions, without groups and dilation, padded by name or by two pairs.

    XLA computes the gradient with respect to the kernel as a convolution whose window is the whole image, and runs
    that at 20 GFLOP per core-second (jax#31662, xla#34273, flax#3551); oneDNN runs it at 110 to 140. On two cores
    the gradient for 500x28x28, 32 -> 64 channels, takes 60 ms and not 350, for 256x26x26, 32 -> 32, 12 and not 66.
    The other two directions are as fast in XLA since jax 0.12, and several times slower before.
    """

    def __call__(  # type: ignore[override]
        self, x: jax.Array, *, relu: bool = False
    ) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height, width, outputs), after a ReLU if so asked."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        size = kernel.shape[:2]
        strides = (self.strides, self.strides) if isinstance(self.strides, int) else tuple(self.strides or (1, 1))
        padding: Any = self.padding
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
        window = Window(size, strides, tuple((before, after) for before, after in padding))
        convolve = _convolution if convolves_in_onednn() else _convolution_of_xla
        return convolve(x, kernel, bias, window, relu)


def convolves_in_onednn() -> bool:
    """Whether programs of this process have their convolutions in oneDNN."""
    # Over several CPU devices XLA would gather the whole batch for a custom call, which it cannot split.
    one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return one_cpu and onednn.library() is not None


def _convolution_of_xla(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, window: Window, relu: bool
) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    if x.dtype == jnp.bfloat16:
        # A fusion by XLA on CPUs (YNNPACK, jax 0.12) of max-pooling, ReLU, convolution and ReLU in bfloat16 gives
        # wrong numbers, NaN among them. This keeps the convolution from being fused with what is before it.
        x = jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    y = jax.lax.conv_general_dilated(x, kernel, window.strides, window.padding, dimension_numbers=layout)
    y = y if bias is None else y + bias
    return nnx.relu(y) if relu else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, window: Window, relu: bool) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        bias,
        cpu=functools.partial(onednn.convolution, window=window, relu=relu),
        default=functools.partial(_convolution_of_xla, window=window, relu=relu),
    )


def _convolution_forward(x, kernel, bias, window, relu):
    y = _convolution(x, kernel, bias, window, relu)
    return y, (x, kernel, bias, y)


def _convolution_backward(window, relu, residuals, grad):
    x, kernel, bias, y = residuals
    if relu:
        grad = jnp.where(y > 0, grad, 0)

    def in_onednn(x, kernel, bias, grad):
        x_grad = onednn.convolution_input_grad(grad, kernel, x.shape, window)
        kernel_grad, bias_grad = onednn.convolution_kernel_grad(x, grad, window, use_bias=bias is not None)
        return x_grad, kernel_grad.astype(kernel.dtype), jax.tree.map(lambda g: g.astype(grad.dtype), bias_grad)

    def in_xla(x, kernel, bias, grad):
        convolve = functools.partial(_convolution_of_xla, window=window, relu=False)
        return jax.vjp(convolve, x, kernel, bias)[1](grad)

    return jax.lax.platform_dependent(x, kernel, bias, grad, cpu=in_onednn, default=in_xla)


_convolution.defvjp(_convolution_forward, _convolution_backward)
