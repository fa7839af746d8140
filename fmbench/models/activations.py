"""What the layers of a model return for given images."""

import jax
import numpy as np
from flax import nnx


def of_layers(model: nnx.Module, images: jax.Array) -> dict[str, np.ndarray]:
    """What each layer of a model, called once in a forward pass, returns.

    Args:
        model: As `fmbench.checkpoint.load_model` returns it.
        images: Normalised, float32 (batch, 28, 28, 1).

    Returns:
        By the layer's path, as in 'blocks.0.conv1': (batch, ...) float32. Where a layer ends in a ReLU of its own,
        that is included; one that the model applies to the result is not.
    """
    return {
        ".".join(map(str, path)): np.asarray(outputs.get_value()[0], np.float32)
        for (*path, method), outputs in nnx.to_flat_state(_capture(model, images))
        if path and method == "__call__"
    }


@nnx.jit
def _capture(model: nnx.Module, images: jax.Array) -> nnx.State:
    _, captured = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(images)
    return captured


def of_convolutions(model: nnx.Module, images: jax.Array) -> dict[str, np.ndarray]:
    """As `of_layers`, of the convolutions alone: (batch, height, width, channels); empty if there are none."""
    modules = nnx.iter_modules(model)
    convolutions = {".".join(map(str, path)) for path, module in modules if isinstance(module, nnx.Conv)}
    if not convolutions:
        return {}  # what such a model is given may be no images
    return {path: output for path, output in of_layers(model, images).items() if path in convolutions}
