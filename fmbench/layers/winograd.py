"""Convolutions of 3 x 3 by Winograd's F(4x4, 3x3): a quarter of the multiplications, for many channels.

On an AMD EPYC winograd.cpp is 1.3 to 5 times as fast as oneDNN's direct convolution (docs/speed.md).

References:
    Lavin & Gray, 2016, "Fast algorithms for convolutional neural networks".
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from fmbench.layers import cpp
from fmbench.layers.onednn import Window

TILE = 4  # pixels of the result on a side
LEAST_TILES = 64  # for fewer the transform of the kernel takes longer than they save
SUMMED = 32, 64, 128, 256, 512  # channels that a product may sum over


def takes(window: Window, dtype: Any, y_shape: Sequence[int], channels: Sequence[int]) -> bool:
    """Whether all three directions of such a convolution can run here, and so should.

    Args:
        window: Of the convolution.
        dtype: Of its arrays.
        y_shape: (batch, height, width) of its result.
        channels: Its inputs and outputs.
    """
    batch, height, width = y_shape
    tiles = batch * math.ceil(height / TILE) * math.ceil(width / TILE)
    return tiles >= LEAST_TILES and all(number in SUMMED for number in channels) and cpp.suits(window, dtype)


convolution = functools.partial(cpp.convolution, "winograd")
convolution_input_grad = functools.partial(cpp.convolution_input_grad, "winograd")
convolution_kernel_grad = functools.partial(cpp.convolution_kernel_grad, "winograd")
