"""Plain convolutional networks: 3x3 kernels, ReLU, zero biases, valid padding unless said.

Sources: reference systems R0 (Baseline), R1 (CNN2) and R3 (the others, named after their convolutions), all in
Keras; Glorot-uniform kernels unless said.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import BatchNorm, Conv, Dropout, flatten, max_pool


class Baseline(nnx.Module):
    """C32-MP2-Flatten-D100-D10: 542,230 parameters.

    Kernels are He-uniform, the last layer's Glorot-uniform.

    Args:
        filters: Of the convolution; the variant with 64 and same padding has 1,256,150 parameters.
        padding: 'VALID', or 'SAME' (628,630 parameters with 32 filters).
    """

    def __init__(
        self,
        *,
        filters: int = 32,
        padding: str = "VALID",
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        he, glorot = nnx.initializers.he_uniform(), nnx.initializers.glorot_uniform()
        side = 14 if padding == "SAME" else 13
        self.conv1 = Conv(1, filters, (3, 3), padding=padding, kernel_init=he, dtype=dtype, rngs=rngs)
        self.dense1 = nnx.Linear(side * side * filters, 100, kernel_init=he, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(100, 10, kernel_init=glorot, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = nnx.relu(max_pool(self.conv1(images), 2))
        x = nnx.relu(self.dense1(flatten(x)))
        return self.head(x)


class CNN1(nnx.Module):
    """C32-MP2-Do.2-D128-D10: 693,962 parameters."""

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None):
        conv, dense = _glorot_layers(dtype, rngs)
        self.conv1 = conv(1, 32)
        self.dropout1 = Dropout(0.2, axis_name=axis_name)
        self.dense1 = dense(13 * 13 * 32, 128)
        self.head = dense(128, 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = nnx.relu(max_pool(self.conv1(images), 2))
        x = flatten(self.dropout1(x, train=train, rngs=rngs))
        x = nnx.relu(self.dense1(x))
        return self.head(x)


class CNN2(nnx.Module):
    """C64-MP2-Do.25-C32-MP2-D32-D10 with sigmoid outputs: 45,066 parameters.

    Keras's sparse cross-entropy takes the outputs for probabilities and scales them so that they sum to one. Their
    logarithms, taken for logits, give the same loss: softmax(log(s)) = s / sum(s).
    """

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None):
        conv, dense = _glorot_layers(dtype, rngs)
        self.conv1 = conv(1, 64)
        self.dropout1 = Dropout(0.25, axis_name=axis_name)
        self.conv2 = conv(64, 32)
        self.dense1 = dense(5 * 5 * 32, 32)
        self.head = dense(32, 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logarithms of the sigmoids (batch, 10)."""
        x = nnx.relu(max_pool(self.conv1(images), 2))
        x = self.dropout1(x, train=train, rngs=rngs)
        x = nnx.relu(max_pool(self.conv2(x), 2))
        x = nnx.relu(self.dense1(flatten(x)))
        return nnx.log_sigmoid(self.head(x))


class CNN3(nnx.Module):
    """C32-MP2-Do.25-C64-MP2-Do.25-C128-Do.4-D128-Do.3-D10: 241,546 parameters."""

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None):
        conv, dense = _glorot_layers(dtype, rngs)
        self.conv1 = conv(1, 32)
        self.dropout1 = Dropout(0.25, axis_name=axis_name)
        self.conv2 = conv(32, 64)
        self.dropout2 = Dropout(0.25, axis_name=axis_name)
        self.conv3 = conv(64, 128)
        self.dropout3 = Dropout(0.4, axis_name=axis_name)
        self.dense1 = dense(3 * 3 * 128, 128)
        self.dropout4 = Dropout(0.3, axis_name=axis_name)
        self.head = dense(128, 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = nnx.relu(max_pool(self.conv1(images), 2))
        x = self.dropout1(x, train=train, rngs=rngs)
        x = nnx.relu(max_pool(self.conv2(x), 2))
        x = self.dropout2(x, train=train, rngs=rngs)
        x = self.conv3(x, relu=True)
        x = flatten(self.dropout3(x, train=train, rngs=rngs))
        x = nnx.relu(self.dense1(x))
        x = self.dropout4(x, train=train, rngs=rngs)
        return self.head(x)


class CNN4(nnx.Module):
    """C32-BN-C32-BN-MP2-Do.25-C64-BN-Do.25-C128-BN-MP2-Do.25-D512-BN-Do.5-D128-BN-Do.5-D10.

    1,221,546 parameters counting the batch norms' running statistics, 1,219,754 trainable. Batch norm comes
    after the ReLU, with Keras's constants (momentum 0.99, epsilon 1e-3).
    """

    def __init__(self, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, axis_name: str | None = None):
        conv, dense = _glorot_layers(dtype, rngs)

        def batch_norm(features: int) -> BatchNorm:
            return BatchNorm(features, momentum=0.99, epsilon=1e-3, dtype=dtype, axis_name=axis_name, rngs=rngs)

        self.conv1 = conv(1, 32)
        self.norm1 = batch_norm(32)
        self.conv2 = conv(32, 32)
        self.norm2 = batch_norm(32)
        self.dropout2 = Dropout(0.25, axis_name=axis_name)
        self.conv3 = conv(32, 64)
        self.norm3 = batch_norm(64)
        self.dropout3 = Dropout(0.25, axis_name=axis_name)
        self.conv4 = conv(64, 128)
        self.norm4 = batch_norm(128)
        self.dropout4 = Dropout(0.25, axis_name=axis_name)
        self.dense1 = dense(4 * 4 * 128, 512)
        self.norm5 = batch_norm(512)
        self.dropout5 = Dropout(0.5, axis_name=axis_name)
        self.dense2 = dense(512, 128)
        self.norm6 = batch_norm(128)
        self.dropout6 = Dropout(0.5, axis_name=axis_name)
        self.head = dense(128, 10)

    def __call__(self, images: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 28, 28, 1) -> logits (batch, 10)."""
        x = self.norm1(self.conv1(images, relu=True), train=train)
        x = self.norm2(self.conv2(x, relu=True), train=train)
        x = self.dropout2(max_pool(x, 2), train=train, rngs=rngs)
        x = self.norm3(self.conv3(x, relu=True), train=train)
        x = self.dropout3(x, train=train, rngs=rngs)
        x = self.norm4(self.conv4(x, relu=True), train=train)
        x = flatten(self.dropout4(max_pool(x, 2), train=train, rngs=rngs))
        x = self.norm5(nnx.relu(self.dense1(x)), train=train)
        x = self.dropout5(x, train=train, rngs=rngs)
        x = self.norm6(nnx.relu(self.dense2(x)), train=train)
        x = self.dropout6(x, train=train, rngs=rngs)
        return self.head(x)


def _glorot_layers(dtype: DTypeLike, rngs: nnx.Rngs):
    """3x3 valid convolution and dense layer as Keras initialises them."""
    glorot = nnx.initializers.glorot_uniform()
    conv = functools.partial(Conv, kernel_size=(3, 3), padding="VALID", kernel_init=glorot, dtype=dtype, rngs=rngs)
    dense = functools.partial(nnx.Linear, kernel_init=glorot, dtype=dtype, rngs=rngs)
    return conv, dense
