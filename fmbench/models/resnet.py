"""Residual networks of the CIFAR kind."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import BatchNorm, Conv


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, strides: int, *, conv, batch_norm):
        self.strides = strides
        self.extra_channels = outputs - inputs
        self.conv1 = conv(inputs, outputs, strides=strides)
        self.norm1 = batch_norm(outputs)
        self.conv2 = conv(outputs, outputs)
        self.norm2 = batch_norm(outputs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / strides, width / strides, outputs)."""
        y = self.norm1(self.conv1(x), train=train, relu=True)
        y = self.norm2(self.conv2(y), train=train)
        # Option A of the paper: subsample, and fill the new channels with zeros.
        shortcut = x[:, :: self.strides, :: self.strides, :]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, self.extra_channels)))
        return nnx.relu(y + shortcut)


class ResNet(nnx.Module):
    """ResNet of `depth` = 6n + 2 layers: three stages of n blocks with 16, 32 and 64 channels.

    Depth 20 has 269,434 trainable parameters on grey images (the paper's 0.27 M on colour).

    Args:
        depth: Number of weighted layers; 20, 32, 44, 56 and 110 in the paper.

    References:
        He et al., 2015, "Deep residual learning for image recognition", section 4.2.
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, 110), got {depth}")
        he = nnx.initializers.he_normal()
        conv = functools.partial(
            Conv,
            kernel_size=(3, 3),
            padding="SAME",
            use_bias=False,
            kernel_init=he,
            dtype=dtype,
            rngs=rngs,
        )
        batch_norm = functools.partial(
            BatchNorm, momentum=0.9, epsilon=1e-5, dtype=dtype, axis_name=axis_name, rngs=rngs
        )
        self.stem = conv(1, 16)
        self.stem_norm = batch_norm(16)
        blocks = []
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64)):
            for block in range((depth - 2) // 6):
                strides = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(inputs, outputs, strides, conv=conv, batch_norm=batch_norm))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(64, 10, kernel_init=he, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        del rngs  # nothing here is random
        x = self.stem_norm(self.stem(images), train=train, relu=True)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x.mean(axis=(1, 2)))
