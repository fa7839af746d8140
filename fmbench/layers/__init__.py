"""Layers that take what Flax's own take, with the parameters and results of theirs, and are fast on CPUs too.

On CPUs convolutions and their gradients run in oneDNN (`fmbench.layers.onednn`), where it is installed and a
program runs on one device at a time; those of 3x3 in float32 in C++ of ours, if they have many channels
(`fmbench.layers.winograd`) or few (`fmbench.layers.direct`) and there is a compiler; so do batch norm and
max-pooling's gradient. Elsewhere XLA's own run. Which is decided when a program is lowered: one for GPUs or TPUs,
and one that is exported, holds XLA's alone.
JAX's settings stay as they are, that of asynchronous dispatch among them.
"""

from fmbench.layers.batch_norm import BatchNorm, conv_batch_norm
from fmbench.layers.convolution import Conv, convolves_in_onednn, describe_convolutions
from fmbench.layers.dropout import Dropout, random_words
from fmbench.layers.pooling import flatten, max_pool

__all__ = [
    "BatchNorm",
    "Conv",
    "Dropout",
    "conv_batch_norm",
    "convolves_in_onednn",
    "describe_convolutions",
    "flatten",
    "max_pool",
    "random_words",
]
