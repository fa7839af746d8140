"""Convolution."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import canonicalize_padding

from fmbench.layers import cpp, onednn
from fmbench.layers.convolution_primitives import convolution, kept_apart
from fmbench.layers.onednn import Window
from fmbench.layers.sharding import is_explicitly_sharded, is_on_one_device


class Conv(nnx.Conv):
    """`nnx.Conv`, optionally followed by a ReLU, in oneDNN where that is the faster.

    Takes every argument that `nnx.Conv` takes, with Flax's results up to rounding. In oneDNN are convolutions of
    two dimensions, (batch, height, width, channels) in float32 or bfloat16, with any strides and any padding by
    zeros, in programs for one CPU device or one device at a time (`jax.shard_map`, `jax.pmap`). All else (masks,
    dilation, groups, other numbers of dimensions, padding by other values, a convolution, precision or sharding of
    one's own) is computed by Flax's own code. Derivatives of all orders and modes, `jax.vmap`, `jax.checkpoint`
    and `jax.export`, whose programs hold XLA's convolution, work as with Flax's layer.

    XLA computes the gradient with respect to the kernel as a convolution whose window is the whole image, and runs
    that at 20 GFLOP per core-second (jax#31662, xla#34273, flax#3551); oneDNN runs it at 110 to 140. On two cores
    the gradient for 500x28x28, 32 -> 64 channels, takes 60 ms and not 350, for 256x26x26, 32 -> 32, 12 and not 66.
    The other two directions are as fast in XLA since jax 0.12, and several times slower before.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None, *, relu: bool = False) -> jax.Array:
        """Convolves `inputs`, (..., *space, in_features), as Flax does; `relu` applies a ReLU to the result."""
        bias = None if self.bias is None else self.bias[...]
        y = None if out_sharding is not None else self._in_library(inputs, self.kernel[...], bias, relu)
        if y is not None:
            return y
        if jnp.bfloat16 in (inputs.dtype, self.dtype):
            inputs = kept_apart(inputs)
        y = super().__call__(inputs, out_sharding)
        return nnx.relu(y) if relu else y

    def scaled(self, inputs: jax.Array, factor: jax.Array, offset: jax.Array, *, relu: bool) -> jax.Array | None:
        """`factor * self(inputs) + offset`, (out_features,), in one convolution; None if no library has it."""
        bias = offset if self.bias is None else self.bias[...] * factor + offset
        return self._in_library(inputs, self.kernel[...] * factor, bias, relu)

    def _in_library(
        self, inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, relu: bool
    ) -> jax.Array | None:
        window = self._window(inputs) if _runs_in_onednn(inputs) else None
        if window is None:
            return None
        x, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        arrays = (x, kernel) if bias is None else (x, kernel, bias)
        if {array.dtype.name for array in arrays} not in ({"float32"}, {"bfloat16"}):
            return None
        return convolution(x, kernel, bias, window, relu)

    def _window(self, inputs: jax.Array) -> Window | None:
        """The convolution as oneDNN has it, or None if it is of another kind."""
        ones: tuple[Any, ...] = (None, 1, (1, 1), [1, 1])
        plain = (
            len(self.kernel_size) == 2
            and inputs.ndim == 4
            and inputs.shape[-1] == self.in_features
            and self.input_dilation in ones
            and self.kernel_dilation in ones
            and self.feature_group_count == 1
            and self.mask is None
            and self.conv_general_dilated is jax.lax.conv_general_dilated
            and self.precision is None
            and jax.config.jax_default_matmul_precision is None
            and self.preferred_element_type is None
        )
        if not plain:
            return None
        strides = self.strides or 1
        strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
        padding: Any = canonicalize_padding(self.padding, 2)
        if isinstance(padding, str):
            if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
                return None
            padding = jax.lax.padtype_to_pads(inputs.shape[1:3], self.kernel_size, strides, padding)
        window = Window(self.kernel_size, strides, tuple((before, after) for before, after in padding))
        return window if min(map(min, window.padding)) >= 0 else None


def convolves_in_onednn() -> bool:
    """Whether programs of this process that run device by device, as training does, convolve in oneDNN."""
    return jax.default_backend() == "cpu" and onednn.library() is not None


def describe_convolutions() -> str:
    """Where programs of this process that run device by device convolve, in words for people."""
    if not convolves_in_onednn():
        return "XLA"
    without = cpp.why_not()
    return f"oneDNN alone ({without})" if without else "oneDNN and C++ of ours"


def _runs_in_onednn(inputs: jax.Array) -> bool:
    # Over several devices XLA would gather the whole batch for a custom call, which it cannot split.
    return convolves_in_onednn() and is_on_one_device() and not is_explicitly_sharded(inputs)
