"""The nets of the speed records."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.errors import UserError
from fmbench.layers import BatchNorm, Conv, max_pool


class Speedrun(nnx.Module):
    """Six 3x3 convolutions with batch norm, three 2x2 poolings, global max-pooling, a dense layer.

    At 28x28 one convolution, at 14x14 two, at 7x7 one, at 3x3 two. The first two poolings come right after their
    convolution, before batch norm and ReLU, which then have a quarter of the work (Jordan, 2024, "94 % on CIFAR-10
    in 3.29 seconds on a single GPU"); the last one comes before its convolution, which then has a quarter of it.

    Args:
        widths: Channels at 14x14, at 7x7 and at 3x3. (32, 64, 128) has 288,170 trainable parameters.
    """

    def __init__(
        self,
        *,
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
        self.conv1 = conv(1, first)
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
        x = self.norm1(max_pool(self.conv1(images), 2), train=train, relu=True)
        x = self.norm2(self.conv2(x), train=train, relu=True)
        x = self.norm3(max_pool(self.conv3(x), 2), train=train, relu=True)
        x = self.norm4(self.conv4(x), train=train, relu=True)
        x = self.norm5(self.conv5(max_pool(x, 2)), train=train, relu=True)
        x = x + self.norm6(self.conv6(x), train=train, relu=True)
        return self.head(x.max(axis=(1, 2)))


class SpeedrunEnsemble(nnx.Module):
    """Several nets of the kind above, trained side by side and independently, that answer together.

    In training the i-th of n nets sees every n-th image of a batch, from the i-th on: its own
    (`input_pipeline.Data.epoch_order`). Otherwise every net sees every image; the answer is the mean of their
    probabilities.

    Args:
        num_members: Number of nets.
        widths: As `Speedrun` has it.

    Raises:
        ValueError: If there are no members.

    References:
        Lakshminarayanan et al., 2017, "Simple and scalable predictive uncertainty estimation using deep
        ensembles".
    """

    def __init__(
        self,
        *,
        num_members: int = 2,
        widths: Sequence[int] = (32, 64, 128),
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        if num_members < 1:
            raise ValueError(f"num_members must be at least 1, got {num_members}")
        self.members = nnx.List(
            Speedrun(widths=widths, rngs=rngs, dtype=dtype, axis_name=axis_name) for _ in range(num_members)
        )

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10).

        In training those of the net that saw the image, otherwise the logarithms of the mean probabilities.

        Raises:
            UserError: If a batch in training cannot be shared equally.
        """
        del rngs  # nothing here is random
        num_members = len(self.members)
        if train:
            if len(images) % num_members:
                raise UserError(
                    f"config.model.num_members is {num_members}, which cannot share a device's {len(images)} "
                    "images of a batch equally; take a config.batch_size of which each device gets a multiple."
                )
            shares = [member(images[i::num_members], train=True) for i, member in enumerate(self.members)]
            return jnp.stack(shares, axis=1).reshape(-1, 10)
        log_probabilities = jnp.stack([jax.nn.log_softmax(member(images)) for member in self.members])
        return jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(num_members)
