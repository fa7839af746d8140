"""Shake-shake regularised residual networks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.models.resnet import HE_NORMAL, residual_layers


class Branch(nnx.Module):
    """ReLU-conv-BN twice."""

    def __init__(self, inputs: int, outputs: int, strides: int, *, conv: Callable, batch_norm: Callable):
        self.conv1 = conv(inputs, outputs, strides=strides)
        self.norm1 = batch_norm(outputs)
        self.conv2 = conv(outputs, outputs)
        self.norm2 = batch_norm(outputs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / strides, width / strides, outputs)."""
        x = self.norm1(self.conv1(nnx.relu(x)), train=train, relu=True)
        return self.norm2(self.conv2(x), train=train)


class Skip(nnx.Module):
    """The way past a block whose channels change: ReLU, two 1x1 convolutions for half of them each, batch norm.

    The second sees the image shifted by a pixel, so that with strides of 2 it sees others than the first.
    """

    def __init__(self, inputs: int, outputs: int, strides: int, *, conv: Callable, batch_norm: Callable):
        self.strides = strides
        self.conv1 = conv(inputs, outputs // 2, kernel_size=(1, 1))
        self.conv2 = conv(inputs, outputs // 2, kernel_size=(1, 1))
        self.norm = batch_norm(outputs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / strides, width / strides, outputs)."""
        x = nnx.relu(x)
        shifted = jnp.pad(x[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
        first, second = (image[:, :: self.strides, :: self.strides] for image in (x, shifted))
        return self.norm(jnp.concatenate([self.conv1(first), self.conv2(second)], axis=-1), train=train)


class ShakeBlock(nnx.Module):
    """Two branches, blended, added to the input or, where the channels change, to what `Skip` makes of it."""

    def __init__(self, inputs: int, outputs: int, strides: int, *, conv: Callable, batch_norm: Callable):
        self.branch1 = Branch(inputs, outputs, strides, conv=conv, batch_norm=batch_norm)
        self.branch2 = Branch(inputs, outputs, strides, conv=conv, batch_norm=batch_norm)
        changes = inputs != outputs
        self.skip = Skip(inputs, outputs, strides, conv=conv, batch_norm=batch_norm) if changes else None

    def __call__(self, x: jax.Array, coefficients: jax.Array | None, *, train: bool) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / strides, width / strides, outputs).

        Args:
            x: The images.
            coefficients: float32 (2, batch), the first branch's share of the result and of the gradient; None for
                a half.
            train: Whether batch norm sees the batch.
        """
        first, second = self.branch1(x, train=train), self.branch2(x, train=train)
        if coefficients is None:
            blended = (first + second) / 2
        else:
            blended = shake(first, second, *coefficients[..., None, None, None].astype(first.dtype))
        return blended + (self.skip(x, train=train) if self.skip else x)


class ShakeShake(nnx.Module):
    """ResNet of `depth` = 6n + 2 layers and two branches: three stages of n blocks, w, 2w and 4w channels wide.

    In training each image, in each block, gets a random share of either branch, and the gradient other ones; in
    evaluation halves. On grey images 26 2x32d has 2,922,874 trainable parameters, 2x64d 11,653,690 and 2x96d
    26,192,634 (the paper's 26.2 M on colour).

    Args:
        depth: Number of weighted layers on the longest way, those of the skips not counted; 26 in the paper.
        width: w, the channels of the first stage; 32, 64 and 96 in the paper, which writes 2x32d.

    References:
        Gastaldi, 2017, "Shake-shake regularization", with "shake" forward and backward, at the level of images.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 26), got {depth}")
        self.axis_name = axis_name
        conv, batch_norm = residual_layers(dtype, axis_name, rngs)
        self.stem = conv(1, 16)
        self.stem_norm = batch_norm(16)
        blocks = []
        inputs = 16
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            for block in range((depth - 2) // 6):
                strides = 2 if stage > 0 and block == 0 else 1
                blocks.append(ShakeBlock(inputs, outputs, strides, conv=conv, batch_norm=batch_norm))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, 10, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10).

        Raises:
            ValueError: If there are no `rngs` in training.
        """
        coefficients: list[jax.Array | None] = [None] * len(self.blocks)
        if train:
            if rngs is None:
                raise ValueError("in training shake-shake needs rngs")
            coefficients = [*draw(rngs.dropout(), len(self.blocks), len(images), self.axis_name)]
        x = self.stem_norm(self.stem(images), train=train)
        for block, own in zip(self.blocks, coefficients, strict=True):
            x = block(x, own, train=train)
        # The mean of bfloat16, fused with what comes before it, is NaN in the XLA of jax 0.12 on CPUs.
        x = jax.lax.optimization_barrier(nnx.relu(x))
        return self.head(x.mean(axis=(1, 2)))


def draw(key: jax.Array, num_blocks: int, batch_size: int, axis_name: str | None = None) -> jax.Array:
    """Coefficients for every block, uniform in [0, 1): float32 (num_blocks, 2, batch).

    As with `Dropout` they depend on an example's place in the global batch only, which `axis_name` splits.
    """
    position = jnp.arange(batch_size)
    if axis_name is not None:
        position += batch_size * jax.lax.axis_index(axis_name)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, position)
    return jax.vmap(lambda key: jax.random.uniform(key, (num_blocks, 2)), out_axes=2)(keys)


@jax.custom_vjp
def shake(first: jax.Array, second: jax.Array, forward: jax.Array, backward: jax.Array) -> jax.Array:
    """Blends: forward * first + (1 - forward) * second, differentiated as if `forward` were `backward`."""
    del backward  # in `_shake_backward`
    return forward * first + (1 - forward) * second


def _shake_forward(first: jax.Array, second: jax.Array, forward: jax.Array, backward: jax.Array):
    return shake(first, second, forward, backward), backward


def _shake_backward(backward: jax.Array, gradient: jax.Array):
    return backward * gradient, (1 - backward) * gradient, None, None


shake.defvjp(_shake_forward, _shake_backward)
