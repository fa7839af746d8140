"""Residual networks for a limit on the number of parameters."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.models.resnet import HE_NORMAL, BasicBlock, residual_layers

BLOCKS_PER_STAGE = 3


class Tiny(nnx.Module):
    """ResNet-20, made narrow: stages of three blocks, whose shortcuts have no parameters.

    With running statistics it has 98,458 parameters for widths (16, 24, 32), 49,316 for (10, 16, 24) and 19,778
    for (8, 10, 14).

    Args:
        widths: Channels of each stage; every stage after the first halves the image's sides.

    References:
        He et al., 2015, "Deep residual learning for image recognition", section 4.2.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        conv, batch_norm = residual_layers(dtype, axis_name, rngs)
        self.stem = conv(1, widths[0])
        self.stem_norm = batch_norm(widths[0])
        blocks = []
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            for block in range(BLOCKS_PER_STAGE):
                strides = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(inputs, outputs, strides, conv=conv, batch_norm=batch_norm))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, 10, kernel_init=HE_NORMAL, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        del rngs  # nothing here is random
        x = self.stem_norm(self.stem(images), train=train, relu=True)
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(x.mean(axis=(1, 2)))
