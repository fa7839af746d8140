"""Layers with the parameters and results of Flax's own that are fast on CPUs too.

On CPUs a convolution, its gradients and batch norm run in oneDNN (`fmbench.onednn`), where it is installed and one
process drives one CPU device; everywhere else XLA's own operations run. Which of them is decided when a program is
lowered, so that a program exported for GPUs or TPUs holds XLA's alone.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmbench import onednn
from fmbench.onednn import Window

FEW_CHANNELS, WIDE_ROW = 16, 64  # CPUs add up rows of so few channels slowly, of so many fast


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


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over channels, optionally followed by a ReLU, with a gradient of its own.

    The gradient that JAX derives passes over x and y more often than the formula needs. On two cores, forward and
    backward over (256, 26, 26, 32) take 21 core-milliseconds derived and 16 by formula; with the ReLU 24 and 19.

    References:
        Ioffe & Szegedy, 2015, "Batch normalization", section 3: the formula of the gradient.
    """

    def __call__(  # type: ignore[override]
        self, x: jax.Array, *, train: bool, relu: bool = False
    ) -> jax.Array:
        """Normalises x, (batch, ..., channels), by the batch in training, and by the running statistics else."""
        if not train:
            y = super().__call__(x, use_running_average=True)
            return nnx.relu(y) if relu else y
        assert self.scale is not None and self.bias is not None
        x, scale, bias = self.promote_dtype((x, self.scale[...], self.bias[...]), dtype=self.dtype)
        y, mean, variance = _batch_norm(x, scale, bias, self.epsilon, self.axis_name, relu)
        for running, batch in ((self.mean, mean), (self.var, variance)):
            running[...] = self.momentum * running[...] + (1 - self.momentum) * batch
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised x, in its dtype, and the batch's mean and variance, float32, through which no gradient flows."""
    mean, mean_square = _batch_means((x, jnp.square(_float32(x))), axis_name)
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)
    factor = _once_per_channel(jax.lax.rsqrt(variance + epsilon) * scale)
    y = (x - mean) * factor + bias
    return (nnx.relu(y) if relu else y).astype(x.dtype), mean, variance


def _batch_norm_forward(x, scale, bias, epsilon, axis_name, relu):
    y, mean, variance = _batch_norm(x, scale, bias, epsilon, axis_name, relu)
    return (y, mean, variance), (x, scale, y, mean, variance)


def _batch_norm_backward(epsilon, axis_name, relu, residuals, gradients):
    x, scale, y, mean, variance = residuals
    grad = _float32(gradients[0])
    if relu:
        grad = jnp.where(y > 0, grad, 0)
    deviation = x - mean
    rescale = jax.lax.rsqrt(variance + epsilon)
    mean_grad, mean_product = _batch_means((grad, grad * deviation), axis_name)
    factor, slope = _once_per_channel((scale * rescale, jnp.square(rescale) * mean_product))
    x_grad = factor * (grad - mean_grad - deviation * slope)
    # Parameters get the gradient of their own part of the batch, as all others do.
    examples = x.size // x.shape[-1]
    mean_grad, mean_product = _batch_means((grad, grad * deviation), None)
    return (
        x_grad.astype(x.dtype),
        (examples * rescale * mean_product).astype(scale.dtype),
        (examples * mean_grad).astype(scale.dtype),
    )


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _batch_means(arrays, axis_name: str | None):
    """Each array's mean over all but the channels, in float32, of the whole batch if an axis is mapped."""
    means = tuple(
        jax.lax.platform_dependent(_float32(array), cpu=_means_of_wide_rows, default=_channel_means)
        for array in arrays
    )
    return means if axis_name is None else jax.lax.pmean(means, axis_name)


def _channel_means(x: jax.Array) -> jax.Array:
    return x.mean(range(x.ndim - 1))


def _means_of_wide_rows(x: jax.Array) -> jax.Array:
    """`_channel_means`, adding up rows of several pixels where a pixel has few channels.

    On a core batch norm, forward and backward, over (512, 28, 28, 4) takes 2.3 ms so and 4.7 with plain means.
    """
    batch, *places, channels = x.shape
    pixels = math.gcd(math.prod(places), WIDE_ROW // channels) if channels <= FEW_CHANNELS else 1
    rows = x.reshape(batch, -1, pixels * channels)
    return rows.mean((0, 1)).reshape(pixels, channels).mean(0)


def _once_per_channel(values):
    """Keeps XLA from computing them again for every element, which is what fusion on CPUs would come to."""
    return jax.lax.optimization_barrier(values)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


class Dropout(nnx.Module):
    """Inverted dropout whose mask depends on an example's place in the global batch only.

    `nnx.Dropout` draws one mask for the array it is given, so a step that sees the batch in eight pieces
    (pmap) drops other units than a step that sees it whole (jit). Here every example has a key of its own,
    folded from the step's key and its index in the global batch: any layout gives the same numbers.

    Args:
        rate: Probability of dropping a unit, in [0, 1).
        axis_name: The mapped axis over which the batch is split, or None if `__call__` sees it whole.

    References:
        Srivastava et al., 2014, "Dropout: a simple way to prevent neural networks from overfitting".
    """

    def __init__(self, rate: float, *, axis_name: str | None = None):
        self.rate = rate
        self.axis_name = axis_name

    def __call__(self, x: jax.Array, *, train: bool, rngs: nnx.Rngs | None) -> jax.Array:
        """Drops units of x, (batch, ...), in training; returns x itself otherwise."""
        if not train or self.rate == 0.0:
            return x
        if rngs is None:
            raise ValueError("Dropout in training needs rngs=nnx.Rngs(dropout=key)")
        position = jnp.arange(x.shape[0])
        if self.axis_name is not None:
            position += x.shape[0] * jax.lax.axis_index(self.axis_name)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rngs.dropout(), position)
        keep = random_words(keys, x.shape[1:]) < np.uint32((1.0 - self.rate) * 2**32)
        return jnp.where(keep, x / (1.0 - self.rate), 0)


def random_words(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random words for dropout masks: keys (batch,) -> uint32 (batch, *shape).

    `jax.random.bits` spends some hundred operations on a word (Threefry), on CPUs 10 ns. Here Threefry makes the
    keys, and a word is its index hashed with the key: 30 times faster, and random enough to drop units by. On two
    cores a step of cnn1 takes 41 instead of 65 ms, of cnn3 83 instead of 122, of the MLP 6.9 instead of 8.5.

    References:
        Appleby, 2011, MurmurHash3: the 32-bit finaliser, applied once for each half of the key.
    """

    def mix(word: jax.Array) -> jax.Array:
        word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
        word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
        return word ^ (word >> 16)

    halves = jax.random.key_data(keys)
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32)
    words = mix(mix(index ^ halves[:, 0, None]) + halves[:, 1, None])
    return words.reshape(-1, *shape)


def flatten(x: jax.Array) -> jax.Array:
    """(batch, height, width, channels) -> (batch, height * width * channels)."""
    return x.reshape(x.shape[0], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, size: int) -> jax.Array:
    """Max-pooling with a window and stride of `size`, valid: `nnx.max_pool`, with a gradient fast on CPUs.

    XLA's own gradient, select-and-scatter, walks the windows one by one on CPUs. On two cores, (256, 26, 26, 32)
    pooled by 2, forward and backward together take 7 ms this way and 116 ms that way; (500, 28, 28, 64) 52 and
    430 ms. Other platforms get XLA's own.

    Args:
        x: (batch, height, width, channels).
        size: Side of the window.

    Returns:
        (batch, height // size, width // size, channels). The gradient goes to the first maximum of a window, as
        XLA's does: equal values are the rule where the background is black.
    """
    return nnx.max_pool(x, (size, size), (size, size))


def _max_pool_forward(x: jax.Array, size: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool(x, size)
    return y, (x, y)


def _max_pool_backward(size: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    return (
        jax.lax.platform_dependent(
            *residuals,
            grad,
            cpu=functools.partial(_max_pool_grad_by_comparison, size),
            default=functools.partial(_max_pool_grad_of_xla, size),
        ),
    )


def _max_pool_grad_of_xla(size: int, x: jax.Array, y: jax.Array, grad: jax.Array) -> jax.Array:
    del y
    return jax.vjp(lambda x: nnx.max_pool(x, (size, size), (size, size)), x)[1](grad)[0]


def _max_pool_grad_by_comparison(size: int, x: jax.Array, y: jax.Array, grad: jax.Array) -> jax.Array:
    """Finds the place of each window's first maximum, then writes the gradient there in one pass."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    inside = x[:, : rows * size, : columns * size]
    first = jnp.zeros(y.shape, jnp.int8)
    for place in reversed(range(size * size)):
        i, j = divmod(place, size)
        first = jnp.where(inside[:, i::size, j::size] == y, jnp.int8(place), first)

    windows = (batch, rows, size, columns, size, channels)
    places = jnp.arange(size * size, dtype=jnp.int8).reshape(1, 1, size, 1, size, 1)

    def spread(per_window: jax.Array) -> jax.Array:
        return jnp.broadcast_to(per_window[:, :, None, :, None, :], windows)

    x_grad = jnp.where(spread(first) == places, spread(grad), 0)
    x_grad = x_grad.reshape(batch, rows * size, columns * size, channels)
    return jnp.pad(x_grad, ((0, 0), (0, height - rows * size), (0, width - columns * size), (0, 0)))


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
