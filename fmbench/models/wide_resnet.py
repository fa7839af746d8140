"""Wide residual networks, and pre-activation ones, of the same blocks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.models.resnet import HE_NORMAL, residual_layers


class WideBlock(nnx.Module):
    """BN-ReLU-conv twice, added to the input; where the channels change, to a 1x1 convolution of it.

    Args:
        inputs: Channels.
        outputs: Channels.
        strides: Of the first convolution.
        follows_stem: Whether the way past the block, too, begins behind the first ReLU, as He et al. have it for
            the first block.
        conv: Makes a convolution, 3x3 unless told otherwise.
        batch_norm: Makes a batch norm.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        strides: int,
        *,
        follows_stem: bool = False,
        conv: Callable,
        batch_norm: Callable,
    ):
        self.follows_stem = follows_stem
        self.norm1 = batch_norm(inputs)
        self.conv1 = conv(inputs, outputs, strides=strides)
        self.norm2 = batch_norm(outputs)
        self.conv2 = conv(outputs, outputs)
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, kernel_size=(1, 1), strides=strides)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / strides, width / strides, outputs)."""
        y = self.norm1(x, train=train, relu=True)
        # As in the authors' code, the convolution of the shortcut sees what the first convolution sees.
        shortcut = self.shortcut(y) if self.shortcut else y if self.follows_stem else x
        y = self.norm2(self.conv1(y), train=train, relu=True)
        return self.conv2(y) + shortcut


class WideResNet(nnx.Module):
    """Pre-activation ResNet of `depth` = 6n + 4 layers: three stages of n blocks with 16k, 32k and 64k channels.

    On grey images WRN-16-4 has 2,748,602 trainable parameters, WRN-28-10 36,478,906 and WRN-40-4 8,948,922 (the
    paper's 2.7, 36.5 and 8.9 M on colour).

    Args:
        depth: Number of convolutions, those of the shortcuts included.
        width: k, the channels as a multiple of those of a ResNet of the CIFAR kind.

    References:
        Zagoruyko & Komodakis, 2016, "Wide residual networks".
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
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, 28, 34, 40), got {depth}")
        conv, batch_norm = residual_layers(dtype, axis_name, rngs)
        self.stem = conv(1, 16)
        blocks = []
        inputs = 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                strides = 2 if stage > 0 and block == 0 else 1
                blocks.append(WideBlock(inputs, outputs, strides, conv=conv, batch_norm=batch_norm))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.norm = batch_norm(inputs)
        self.head = nnx.Linear(inputs, 10, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        del rngs  # nothing here is random
        x = self.stem(images)
        for block in self.blocks:
            x = block(x, train=train)
        x = self.norm(x, train=train, relu=True)
        # The mean of bfloat16, fused with what comes before it, is NaN in the XLA of jax 0.12 on CPUs.
        x = jax.lax.optimization_barrier(x)
        return self.head(x.mean(axis=(1, 2)))


class PreActResNet(nnx.Module):
    """Pre-activation ResNet of `depth` = 6n + 2 layers: three stages of n blocks with 16k, 32k and 64k channels.

    It is WRN-(6n + 4)-k with a stem of 16k channels for 16. Four times as wide, on grey images, depth 20 has
    4,325,834 trainable parameters and depth 50 12,076,234.

    Args:
        depth: Number of weighted layers, the convolutions of the shortcuts not counted.
        width: k, the channels as a multiple of those of a ResNet of the CIFAR kind.

    References:
        He et al., 2016, "Identity mappings in deep residual networks"; projections where the channels change.
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
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 50), got {depth}")
        conv, batch_norm = residual_layers(dtype, axis_name, rngs)
        inputs = 16 * width
        self.stem = conv(1, inputs)
        blocks: list[WideBlock] = []
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 2) // 6):
                strides = 2 if stage > 0 and block == 0 else 1
                first = not blocks
                blocks.append(
                    WideBlock(inputs, outputs, strides, follows_stem=first, conv=conv, batch_norm=batch_norm)
                )
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.norm = batch_norm(inputs)
        self.head = nnx.Linear(inputs, 10, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        del rngs  # nothing here is random
        x = self.stem(images)
        for block in self.blocks:
            x = block(x, train=train)
        x = jax.lax.optimization_barrier(self.norm(x, train=train, relu=True))  # as in WideResNet
        return self.head(x.mean(axis=(1, 2)))
