"""Convolutions of 3 x 3 of few channels by their definition, such as the first of a net.

On an AMD EPYC direct.cpp is 1.1 to 10 times as fast as oneDNN (docs/speed.md).
"""

import functools
from collections.abc import Sequence
from typing import Any

from fmbench.layers import cpp
from fmbench.layers.cpp import LANES
from fmbench.layers.onednn import Window

INPUTS = 1, 4, 8  # channels, to a multiple of LANES
FEW = (1, 4), (1, 8), (4, 4), (8, 8)  # inputs and outputs, too
LEAST_IMAGES = 8  # for fewer a call takes longer to start than they do
LARGEST_PADDING = 2


def takes(window: Window, dtype: Any, y_shape: Sequence[int], channels: Sequence[int]) -> bool:
    """As `winograd.takes`."""
    (batch, _, width), (inputs, outputs) = y_shape, channels
    padding = window.padding[0][0]
    return (
        batch >= LEAST_IMAGES
        and ((inputs in INPUTS and outputs % LANES == 0) or (inputs, outputs) in FEW)
        and width >= LANES + 2 * padding  # rows of an image, and of its gradient, have a whole vector
        and padding <= LARGEST_PADDING
        and cpp.suits(window, dtype)
    )


convolution = functools.partial(cpp.convolution, "direct")
convolution_input_grad = functools.partial(cpp.convolution_input_grad, "direct")
convolution_kernel_grad = functools.partial(cpp.convolution_kernel_grad, "direct")
