"""VGG-like network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import Conv, Dropout, flatten, max_pool


class VGGLike(nnx.Module):
    """Four convolutions and three dense layers: 1,505,034 parameters.

    `C32 same-C64 same-MP2-Do.5-C128 same-C256 valid-MP(3x3, stride 3)-Do.5-D256-LReLU-Do.5-D256-LReLU-D10`,
    ReLU after the convolutions, leaky ReLU with slope 0.3 after the dense layers.

    Source: reference system R2, in Keras; Glorot-uniform kernels, zero biases.
    """

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None):
        glorot = nnx.initializers.glorot_uniform()

        def conv(inputs: int, outputs: int, padding: str) -> Conv:
            return Conv(
                inputs,
                outputs,
                (3, 3),
                padding=padding,
                kernel_init=glorot,
                dtype=dtype,
                rngs=rngs,
            )

        def dense(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, kernel_init=glorot, dtype=dtype, rngs=rngs)

        self.conv1 = conv(1, 32, "SAME")
        self.conv2 = conv(32, 64, "SAME")
        self.dropout2 = Dropout(0.5, axis_name=axis_name)
        self.conv3 = conv(64, 128, "SAME")
        self.conv4 = conv(128, 256, "VALID")
        self.dropout4 = Dropout(0.5, axis_name=axis_name)
        self.dense1 = dense(4 * 4 * 256, 256)
        self.dropout5 = Dropout(0.5, axis_name=axis_name)
        self.dense2 = dense(256, 256)
        self.head = dense(256, 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = self.conv1(images, relu=True)
        x = nnx.relu(max_pool(self.conv2(x), 2))
        x = self.dropout2(x, train=train, rngs=rngs)
        x = self.conv3(x, relu=True)
        x = nnx.relu(max_pool(self.conv4(x), 3))
        x = flatten(self.dropout4(x, train=train, rngs=rngs))
        x = nnx.leaky_relu(self.dense1(x), 0.3)
        x = self.dropout5(x, train=train, rngs=rngs)
        x = nnx.leaky_relu(self.dense2(x), 0.3)
        return self.head(x)
