"""Transfer learning: backbones that other people trained on ImageNet, and the head that is trained here.

The backbones are frozen: they know no training mode, and their batch norms are folded into the convolutions before
them. Their parameters come from `fmbench.pretrained`; `fmbench.features` runs them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmbench.layers import Conv, Dropout, flatten, max_pool

# Each stage of EfficientNet-Lite0: side of the depthwise kernel, strides of its first block, expansion, channels,
# blocks.
LITE0_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
VGG19_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions


class TransferHead(nnx.Module):
    """D512-ReLU-Do.5-D10 on the features of a backbone.

    With VGG19's 8,192 features it has 4,199,946 parameters, as reference system R3's head has; with
    EfficientNet-Lite0's 1,280 it has 661,002. Kernels are Glorot-uniform.

    Args:
        num_features: Of one image.
        hidden: Units of the hidden layer.
        dropout: Probability of dropping one of them.
    """

    def __init__(
        self,
        *,
        num_features: int,
        hidden: int = 512,
        dropout: float = 0.5,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
    ):
        glorot = nnx.initializers.glorot_uniform()
        self.dense1 = nnx.Linear(num_features, hidden, kernel_init=glorot, dtype=dtype, rngs=rngs)
        self.dropout1 = Dropout(dropout, axis_name=axis_name)
        self.head = nnx.Linear(hidden, 10, kernel_init=glorot, dtype=dtype, rngs=rngs)

    def __call__(self, features: jax.Array, *, train: bool = False, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, num_features) -> logits (batch, 10)."""
        x = nnx.relu(self.dense1(features))
        x = self.dropout1(x, train=train, rngs=rngs)
        return self.head(x)


class DepthwiseConv(nnx.Module):
    """A convolution of each channel by itself, padded 'SAME', as a sum of shifted images.

    On CPUs XLA runs convolutions of as many groups as channels several times slower than this sum.
    """

    def __init__(self, channels: int, size: int, strides: int, *, rngs: nnx.Rngs):
        self.strides = strides
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, size, 1, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> (batch, height / strides, width / strides, channels), rounded up."""
        kernel, strides = self.kernel[...], self.strides
        size = kernel.shape[:2]
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, (strides, strides), "SAME")
        rows, columns = (-(-length // strides) for length in x.shape[1:3])
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        y = self.bias[...]
        for i in range(size[0]):
            for j in range(size[1]):
                shifted = padded[:, i : i + strides * rows : strides, j : j + strides * columns : strides]
                y = y + shifted * kernel[i, j, 0]
        return y


class InvertedBottleneck(nnx.Module):
    """Expand (1x1), convolve each channel, project (1x1), and add the input where the shapes allow.

    Args:
        inputs: Channels.
        outputs: Channels.
        expansion: Ratio of the channels between to `inputs`; 1: nothing is expanded.
        size: Side of the depthwise kernel.
        strides: Of the depthwise convolution.
    """

    def __init__(
        self, inputs: int, outputs: int, expansion: int, size: int, strides: int, *, conv: Callable, rngs: nnx.Rngs
    ):
        between = expansion * inputs
        self.has_shortcut = strides == 1 and inputs == outputs
        self.expand = conv(inputs, between, (1, 1)) if expansion > 1 else None
        self.depthwise = DepthwiseConv(between, size, strides, rngs=rngs)
        self.project = conv(between, outputs, (1, 1))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / strides, width / strides, outputs), rounded up."""
        y = nnx.relu6(self.expand(x)) if self.expand else x
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.has_shortcut else y


class EfficientNetLite0(nnx.Module):
    """EfficientNet-Lite0 without its classifier: 3,350,000 parameters, the batch norms folded.

    Unlike EfficientNet-B0 it has ReLU6 for swish and no squeeze-and-excitation. Images are RGB, (x - 127) / 128.

    References:
        Tan & Le, 2019, "EfficientNet: rethinking model scaling for convolutional neural networks".
        https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(Conv, padding="SAME", rngs=rngs)
        self.stem = conv(3, 32, (3, 3), strides=2)
        blocks = []
        inputs = 32
        for size, first_strides, expansion, outputs, num_blocks in LITE0_STAGES:
            for index in range(num_blocks):
                strides = 1 if index else first_strides
                blocks.append(InvertedBottleneck(inputs, outputs, expansion, size, strides, conv=conv, rngs=rngs))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = conv(320, 1280, (1, 1))

    def __call__(self, images: jax.Array) -> jax.Array:
        """(batch, height, width, 3) -> features (batch, 1280): the mean over all places."""
        x = nnx.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return nnx.relu6(self.head(x)).mean(axis=(1, 2))


class VGG19(nnx.Module):
    """VGG19 without its dense layers: 20,024,384 parameters in 16 convolutions, named as Keras names them.

    Images are BGR on 0..255, less ImageNet's mean.

    References:
        Simonyan & Zisserman, 2014, "Very deep convolutional networks for large-scale image recognition", net E.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        convs = {}
        inputs = 3
        for stage, (outputs, num_convs) in enumerate(VGG19_STAGES, start=1):
            for index in range(1, num_convs + 1):
                convs[f"block{stage}_conv{index}"] = Conv(inputs, outputs, (3, 3), padding="SAME", rngs=rngs)
                inputs = outputs
        self.convs = nnx.Dict(convs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(batch, height, width, 3) -> features (batch, height // 32 * (width // 32) * 512)."""
        x = images
        for stage, (_, num_convs) in enumerate(VGG19_STAGES, start=1):
            for index in range(1, num_convs + 1):
                x = self.convs[f"block{stage}_conv{index}"](x, relu=True)
            x = max_pool(x, 2)
        return flatten(x)


BACKBONES: dict[str, Callable[..., nnx.Module]] = {"efficientnet_lite0": EfficientNetLite0, "vgg19": VGG19}
