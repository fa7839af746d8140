"""Layers that Flax does not have in the form fmbench needs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


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
