"""Layers with the parameters and results of Flax's own that are fast on CPUs too.

On CPUs a convolution and its gradients run in oneDNN (`fmbench.layers.onednn`), where it is installed and one
process drives one CPU device; everywhere else XLA's own operations run. Which of them is decided when a program is
lowered, so that a program exported for GPUs or TPUs holds XLA's alone.
"""

from fmbench.layers.batch_norm import BatchNorm
from fmbench.layers.convolution import Conv, convolves_in_onednn
from fmbench.layers.dropout import Dropout, random_words
from fmbench.layers.pooling import flatten, max_pool

__all__ = ["BatchNorm", "Conv", "Dropout", "convolves_in_onednn", "flatten", "max_pool", "random_words"]
