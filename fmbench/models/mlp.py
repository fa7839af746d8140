"""Multi-layer perceptron."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import Dropout, flatten


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
