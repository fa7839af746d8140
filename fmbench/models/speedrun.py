"""The nets of the speed records."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import BatchNorm, Conv, conv_batch_norm, max_pool


class Speedrun(nnx.Module):
    """A stem, six 3x3 convolutions with batch norm, three 2x2 poolings, global max-pooling, a dense layer.

    After the stem one convolution at 28x28, two at 14x14, one at 7x7, two at 3x3. The first two poolings come
    right after their convolution, before batch norm and ReLU, which then have a quarter of the work (Jordan, 2024,
    "94 % on CIFAR-10 in 3.29 seconds on a single GPU"); the last one comes before its convolution, which then has
    a quarter of it.

    Args:
        stem_width: Channels of the stem.
        widths: Channels at 14x14, at 7x7 and at 3x3. (32, 64, 128), with 4 in the stem, has 289,382 trainable
            parameters; (64, 128, 256), with 8, 1,153,026.
    """

    def __init__(
        self,
        *,
        stem_width: int = 4,
        widths: Sequence[int] = (32, 64, 128),
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        conv = functools.partial(
            Conv,
            kernel_size=(3, 3),
            padding="SAME",
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            dtype=dtype,
            rngs=rngs,
        )
        batch_norm = functools.partial(
            BatchNorm, momentum=0.9, epsilon=1e-5, dtype=dtype, axis_name=axis_name, rngs=rngs
        )
        first, second, third = widths
        self.stem = Stem(stem_width, conv=conv, batch_norm=batch_norm)
        self.conv1 = conv(stem_width, first)
        self.norm1 = batch_norm(first)
        self.conv2 = conv(first, first)
        self.norm2 = batch_norm(first)
        self.conv3 = conv(first, second)
        self.norm3 = batch_norm(second)
        self.conv4 = conv(second, second)
        self.norm4 = batch_norm(second)
        self.conv5 = conv(second, third)
        self.norm5 = batch_norm(third)
        self.conv6 = conv(third, third)
        self.norm6 = batch_norm(third)
        self.head = nnx.Linear(third, 10, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        del rngs  # nothing here is random
        x = self.norm1(max_pool(self.conv1(self.stem(images, train=train)), 2), train=train, relu=True)
        x = conv_batch_norm(self.conv2, self.norm2, x, train=train, relu=True)
        x = self.norm3(max_pool(self.conv3(x), 2), train=train, relu=True)
        x = conv_batch_norm(self.conv4, self.norm4, x, train=train, relu=True)
        x = conv_batch_norm(self.conv5, self.norm5, max_pool(x, 2), train=train, relu=True)
        x = x + conv_batch_norm(self.conv6, self.norm6, x, train=train, relu=True)
        return self.head(x.max(axis=(1, 2)))


class Stem(nnx.Module):
    """Three 3x3 convolutions with batch norm and ReLU, of which the first one's result is added in the end.

    They see what is lost to a net that pools right after its first convolution.
    """

    def __init__(self, width: int, *, conv: Callable[..., Conv], batch_norm: Callable[..., BatchNorm]):
        self.conv1 = conv(1, width)
        self.norm1 = batch_norm(width)
        self.conv2 = conv(width, width)
        self.norm2 = batch_norm(width)
        self.conv3 = conv(width, width)
        self.norm3 = batch_norm(width)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """(batch, 28, 28, 1) -> (batch, 28, 28, width)."""
        x = conv_batch_norm(self.conv1, self.norm1, images, train=train, relu=True)
        y = conv_batch_norm(self.conv2, self.norm2, x, train=train, relu=True)
        return x + conv_batch_norm(self.conv3, self.norm3, y, train=train, relu=True)
