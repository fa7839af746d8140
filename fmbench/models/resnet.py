"""Residual networks, of the CIFAR and of the ImageNet kind."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import BatchNorm, Conv, conv_batch_norm

HE_NORMAL = nnx.initializers.he_normal()


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut: option A of the paper, without parameters, or option B, a projection.

    Args:
        inputs: Channels.
        outputs: Channels.
        strides: Of the first convolution.
        project: Whether the shortcut, where the channels change, is a 1x1 convolution with batch norm.
        conv: Makes a convolution, 3x3 unless told otherwise.
        batch_norm: Makes a batch norm.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        strides: int,
        *,
        project: bool = False,
        conv: Callable,
        batch_norm: Callable,
    ):
        self.strides = strides
        self.extra_channels = outputs - inputs
        self.conv1 = conv(inputs, outputs, strides=strides)
        self.norm1 = batch_norm(outputs)
        self.conv2 = conv(outputs, outputs)
        self.norm2 = batch_norm(outputs)
        project = project and inputs != outputs
        self.projection = conv(inputs, outputs, kernel_size=(1, 1), strides=strides) if project else None
        self.projection_norm = batch_norm(outputs) if project else None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / strides, width / strides, outputs)."""
        y = conv_batch_norm(self.conv1, self.norm1, x, train=train, relu=True)
        y = conv_batch_norm(self.conv2, self.norm2, y, train=train)
        if self.projection and self.projection_norm:
            shortcut = conv_batch_norm(self.projection, self.projection_norm, x, train=train)
        else:
            # Option A: subsample, and fill the new channels with zeros.
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
        conv, batch_norm = residual_layers(dtype, axis_name, rngs)
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
        self.head = nnx.Linear(64, 10, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        del rngs  # nothing here is random
        x = conv_batch_norm(self.stem, self.stem_norm, images, train=train, relu=True)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x.mean(axis=(1, 2)))


class ResNet18(nnx.Module):
    """ResNet-18: four stages of two blocks with 64, 128, 256 and 512 channels, and projection shortcuts.

    As is usual for small images, the stem is a 3x3 convolution without stride or pooling. 11,172,810 trainable
    parameters.

    References:
        He et al., 2015, "Deep residual learning for image recognition", table 1.
    """

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None):
        conv, batch_norm = residual_layers(dtype, axis_name, rngs)
        self.stem = conv(1, 64)
        self.stem_norm = batch_norm(64)
        blocks = []
        inputs = 64
        for outputs in (64, 128, 256, 512):
            strides = 1 if inputs == outputs else 2
            blocks.append(BasicBlock(inputs, outputs, strides, project=True, conv=conv, batch_norm=batch_norm))
            blocks.append(BasicBlock(outputs, outputs, 1, conv=conv, batch_norm=batch_norm))
            inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(512, 10, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        del rngs  # nothing here is random
        x = conv_batch_norm(self.stem, self.stem_norm, images, train=train, relu=True)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x.mean(axis=(1, 2)))


def residual_layers(dtype: DTypeLike, axis_name: str | None, rngs: nnx.Rngs) -> tuple[Callable, Callable]:
    """Makers of residual nets' layers: He-normal convolution without bias, 3x3 by default; and batch norm."""
    conv = functools.partial(
        Conv, kernel_size=(3, 3), padding="SAME", use_bias=False, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs
    )
    batch_norm = functools.partial(
        BatchNorm, momentum=0.9, epsilon=1e-5, dtype=dtype, axis_name=axis_name, rngs=rngs
    )
    return conv, batch_norm
