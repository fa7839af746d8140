"""Batch norm."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from fmbench.layers import cpp
from fmbench.layers.convolution import Conv
from fmbench.layers.primitives import with_cpp, with_transpose
from fmbench.layers.sharding import is_explicitly_sharded, vary_alike

FEW_CHANNELS, WIDE_ROW = 16, 64  # CPUs add up rows of so few channels slowly, of so many fast


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm`, optionally followed by a ReLU, with a gradient of its own.

    Takes every argument that `nnx.BatchNorm` takes, with Flax's results and running statistics up to rounding. Our
    gradient is for what is normalised by the batch, over all axes but a last one of channels, in up to 32 bits.
    All else (running statistics, masks, other axes, groups of devices, no scale or no bias, the two-pass variance)
    is computed by Flax's own code. Derivatives of all orders and modes, `jax.vmap`, `jax.checkpoint`,
    `jax.shard_map` and `jax.export` work as with Flax's layer.

    The gradient that JAX derives passes over x and y more often than the formula needs. On two cores, forward and
    backward over (256, 26, 26, 32) take 21 core-milliseconds derived and 16 by formula; with the ReLU 24 and 19.

    References:
        Ioffe & Szegedy, 2015, "Batch normalization", section 3: the formula of the gradient.
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        train: bool | None = None,
        relu: bool = False,
    ) -> jax.Array:
        """Normalises x, (batch, ..., channels), or with the channels where `axis` has them.

        Args:
            x: What to normalise.
            use_running_average: As in Flax: by the running statistics, or by the batch's, which then update the
                running ones. Where it is None, the constructor, `train()` or `eval()` has decided.
            mask: As in Flax: the elements that the batch's statistics are of.
            train: The opposite of `use_running_average`.
            relu: Whether to apply a ReLU to the result.

        Raises:
            TypeError: If both `use_running_average` and `train` are given.
        """
        if train is not None:
            if use_running_average is not None:
                raise TypeError("BatchNorm takes use_running_average or train, its opposite, and not both")
            use_running_average = not train
        if use_running_average is None:
            use_running_average = self.use_running_average
        arrays = None if use_running_average is not False or mask is not None else self._plain_arrays(x)
        if arrays is None:
            y = super().__call__(x, use_running_average, mask=mask)
            return nnx.relu(y) if relu else y
        y, mean, variance = _batch_norm(*vary_alike(*arrays), self.epsilon, self.axis_name, relu)
        for running, batch in ((self.mean, mean), (self.var, variance)):
            running[...] = jax.lax.stop_gradient(self.momentum * running[...] + (1 - self.momentum) * batch)
        return y

    def _plain_arrays(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """x, scale and bias as our gradient takes them, or None if the layer or x is of another kind."""
        if self.scale is None or self.bias is None or x.ndim < 2 or x.size == 0 or is_explicitly_sharded(x):
            return None
        plain = (
            self.axis in (-1, x.ndim - 1)
            and x.shape[-1] == self.num_features
            and self.axis_index_groups is None
            and self.use_fast_variance
            and self.promote_dtype is dtypes.promote_dtype
            and isinstance(self.epsilon, float)
        )
        if not plain:
            return None
        arrays = x, self.mean[...], self.var[...], self.scale[...], self.bias[...]  # all have a say in the dtype
        x, *_, scale, bias = self.promote_dtype(arrays, dtype=self.dtype)
        return (x, scale, bias) if x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else None


def conv_batch_norm(conv: Conv, norm: BatchNorm, x: jax.Array, *, train: bool, relu: bool = False) -> jax.Array:
    """`norm(conv(x), train=train, relu=relu)`; in inference one convolution, where a library has those.

    The running statistics are then a part of the convolution's kernel and bias, and y is written once. For a
    single image the kernel would be the larger of both.
    """
    plain = norm.axis in (-1, x.ndim - 1) and len(x) > 1
    if not train and plain and norm.scale is not None and norm.bias is not None:
        factor = jax.lax.rsqrt(norm.var[...] + norm.epsilon) * norm.scale[...]
        y = conv.scaled(x, factor, norm.bias[...] - norm.mean[...] * factor, relu=relu)
        if y is not None:
            return y
    return norm(conv(x), train=train, relu=relu)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised x, in its dtype, and the batch's mean and variance, float32."""
    if not _has_whole_batch(axis_name):
        return _forward(x, scale, bias, epsilon=epsilon, relu=relu, axis_name=axis_name)
    y, mean, variance = _forward_or_in_cpp(x, scale, bias, epsilon=epsilon, relu=relu)
    return (y, mean, variance) if axis_name is None else (y, *jax.lax.pmean((mean, variance), axis_name))


def _has_whole_batch(axis_name: str | None) -> bool:
    """Whether a device has all of it, as the single one of a mapped axis does."""
    return axis_name is None or jax.lax.psum(1, axis_name) == 1


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, relu: bool, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, mean_square = _batch_means((x, jnp.square(_float32(x))), axis_name)
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)
    factor = _once_per_channel(jax.lax.rsqrt(variance + epsilon) * _float32(scale))
    y = (_float32(x) - mean) * factor + _float32(bias)
    return (nnx.relu(y) if relu else y).astype(x.dtype), mean, variance


_forward_or_in_cpp = with_cpp(_forward, cpp.batch_norm, cpp.suits_batch_norm)


@_batch_norm.defjvp
def _batch_norm_jvp(epsilon, axis_name, relu, arrays, tangents):
    x, scale, bias = arrays
    y, mean, variance = _batch_norm(x, scale, bias, epsilon, axis_name, relu)
    params = {"epsilon": epsilon, "axis_name": axis_name, "relu": relu}
    y_tangent = _linear_batch_norm(tangents, (x, scale, bias, y, mean, variance), **params)
    x_tangent = _float32(tangents[0])
    mean_tangent, product = _batch_means((x_tangent, x_tangent * (_float32(x) - mean)), axis_name)
    return (y, mean, variance), (y_tangent, mean_tangent, jnp.where(variance > 0, 2 * product, 0))


def _batch_norm_tangent(tangents, residuals, *, epsilon, axis_name, relu):
    x, scale, _, y, mean, variance = residuals
    x_tangent, scale_tangent, bias_tangent = map(_float32, tangents)
    deviation = _float32(x) - mean
    rescale = jax.lax.rsqrt(variance + epsilon)
    mean_tangent, mean_product = _batch_means((x_tangent, x_tangent * deviation), axis_name)
    slope = _slope(rescale, mean_product, variance)
    tangent = _float32(scale) * rescale * (x_tangent - mean_tangent - deviation * slope)
    tangent += deviation * (rescale * scale_tangent) + bias_tangent
    return (jnp.where(y > 0, tangent, 0) if relu else tangent).astype(y.dtype)


def _batch_norm_grad(grad, residuals, *, epsilon, axis_name, relu):
    by_axis = functools.partial(_backward, axis_name=axis_name)
    backward: Any = _backward_or_in_cpp if _has_whole_batch(axis_name) else by_axis
    return backward(*residuals, grad, epsilon=epsilon, relu=relu)


def _backward(x, scale, bias, y, mean, variance, grad, *, epsilon, relu, axis_name=None):
    del bias  # y has it; C++ has no y
    grad = _float32(grad)
    if relu:
        grad = jnp.where(y > 0, grad, 0)
    deviation = _float32(x) - mean
    rescale = jax.lax.rsqrt(variance + epsilon)
    mean_grad, mean_product = _batch_means((grad, grad * deviation), axis_name)
    factor, slope = _once_per_channel((_float32(scale) * rescale, _slope(rescale, mean_product, variance)))
    x_grad = factor * (grad - mean_grad - deviation * slope)
    # Parameters get the gradient of their own part of the batch, as all others do.
    examples = x.size // x.shape[-1]
    mean_grad, mean_product = _batch_means((grad, grad * deviation), None)
    return (
        x_grad.astype(x.dtype),
        (examples * rescale * mean_product).astype(scale.dtype),
        (examples * mean_grad).astype(scale.dtype),
    )


_backward_or_in_cpp = with_cpp(_backward, cpp.batch_norm_grad, cpp.suits_batch_norm)
_linear_batch_norm = with_transpose(_batch_norm_tangent, _batch_norm_grad)


def _slope(rescale: jax.Array, mean_product: jax.Array, variance: jax.Array) -> jax.Array:
    """How much of each deviation the variance takes away: nothing where rounding made it negative, and so zero."""
    return jnp.where(variance > 0, jnp.square(rescale) * mean_product, 0)


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
