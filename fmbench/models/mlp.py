"""Nets of dense layers only."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import BatchNorm, Dropout, flatten


class MLP(nnx.Module):
    """256-512-100-10 with leaky ReLU (slope 0.3) and dropout 0.4, 0.4, 0.5: 384,854 parameters.

    Source: reference system R2, an MLP in Keras; Glorot-uniform kernels, zero biases.
    """

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None):
        def dense(inputs: int, outputs: int) -> nnx.Linear:
            glorot = nnx.initializers.glorot_uniform()
            return nnx.Linear(inputs, outputs, kernel_init=glorot, dtype=dtype, rngs=rngs)

        self.dense1 = dense(784, 256)
        self.dropout1 = Dropout(0.4, axis_name=axis_name)
        self.dense2 = dense(256, 512)
        self.dropout2 = Dropout(0.4, axis_name=axis_name)
        self.dense3 = dense(512, 100)
        self.dropout3 = Dropout(0.5, axis_name=axis_name)
        self.head = dense(100, 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = flatten(images)
        x = nnx.leaky_relu(self.dense1(x), 0.3)
        x = self.dropout1(x, train=train, rngs=rngs)
        x = nnx.leaky_relu(self.dense2(x), 0.3)
        x = self.dropout2(x, train=train, rngs=rngs)
        x = nnx.leaky_relu(self.dense3(x), 0.3)
        x = self.dropout3(x, train=train, rngs=rngs)
        return self.head(x)


class FullyConnected(nnx.Module):
    """Dense layers with ReLU and dropout 0.25.

    Source: reference system R4, in PyTorch, whose default initialisation it has: kernels and biases uniform
    within 1 / sqrt(inputs). Its nets are (128, 64) with one dropout, 109,386 parameters, and (392, 196, 98, 49)
    with three, 409,405.

    Args:
        widths: Of the layers before the last one, which has 10 outputs.
        num_dropouts: How many of them, from the first on, are followed by dropout.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        num_dropouts: int,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        def dense(inputs: int, outputs: int) -> nnx.Linear:
            uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

            def uniform_bias(key, shape, *arguments):
                return uniform(key, (inputs, *shape), *arguments)[0]

            return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform_bias, dtype=dtype, rngs=rngs)

        self.hidden = nnx.List([dense(*sizes) for sizes in itertools.pairwise([784, *widths])])
        self.dropouts = nnx.List(Dropout(0.25, axis_name=axis_name) for _ in range(num_dropouts))
        self.head = dense(widths[-1], 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = flatten(images)
        for layer, dropout in itertools.zip_longest(self.hidden, self.dropouts):
            x = nnx.relu(layer(x))
            if dropout:
                x = dropout(x, train=train, rngs=rngs)
        return self.head(x)


class BatchNormMLP(nnx.Module):
    """Dense layers, each followed by batch norm, ReLU and dropout.

    Kernels are He-normal; the layers before a batch norm have no biases, which it would take away again.

    Args:
        widths: Of the layers before the last one, which has 10 outputs.
        dropout: Probability of dropping a unit.

    References:
        Ioffe & Szegedy, 2015, "Batch normalization"; He et al., 2015, "Delving deep into rectifiers"; Srivastava
        et al., 2014, "Dropout: a simple way to prevent neural networks from overfitting".
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        dropout: float,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        dense = functools.partial(nnx.Linear, kernel_init=nnx.initializers.he_normal(), dtype=dtype, rngs=rngs)
        self.hidden = nnx.List(dense(*sizes, use_bias=False) for sizes in itertools.pairwise([784, *widths]))
        self.norms = nnx.List(
            BatchNorm(width, momentum=0.9, dtype=dtype, axis_name=axis_name, rngs=rngs) for width in widths
        )
        self.dropouts = nnx.List(Dropout(dropout, axis_name=axis_name) for _ in widths)
        self.head = dense(widths[-1], 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = flatten(images)
        for layer, norm, dropout in zip(self.hidden, self.norms, self.dropouts, strict=True):
            x = norm(layer(x), train=train, relu=True)
            x = dropout(x, train=train, rngs=rngs)
        return self.head(x)
