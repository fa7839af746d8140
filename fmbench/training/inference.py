"""What a trained model says of images."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fmbench.data import features
from fmbench.errors import UserError
from fmbench.models import activations, split_model
from fmbench.training import input_pipeline

BATCH_SIZE = 250  # small, because the results of all layers are held at once


def layer_features(model: nnx.Module, inputs: np.ndarray, normalization: str, layer: str | None) -> np.ndarray:
    """What a layer of a model returns.

    Args:
        model: As `fmbench.checkpoint.load_model` returns it.
        inputs: uint8 (n, 28, 28), or (n, num_features) if the model is one on features.
        normalization: That of the model's description.
        layer: A path, as in 'dense1' or 'blocks.0.conv1'; None stands for what `head` is given.

    Returns:
        float32 (n, size of the layer).

    Raises:
        UserError: If the model has no such layer; lists those it has.
    """
    asked = f"--layer={layer}" if layer else "--layer is missing, which stands for the input of head"
    if layer is None:
        layer, copy = "head", cast(Any, nnx.clone(model))
        copy.head = _Identity()  # what it returns is what it is given
        model = copy
    parts = []
    for start in tqdm(range(0, len(inputs), BATCH_SIZE), desc="features", unit="batch", disable=None):
        batch = input_pipeline.normalize(inputs[start : start + BATCH_SIZE], normalization)
        outputs = activations.of_layers(model, batch)
        if layer not in outputs:
            raise UserError(f"{asked}: the model has no such layer; it has {', '.join(outputs)}.")
        parts.append(outputs[layer].reshape(len(batch), -1))
    return np.concatenate(parts)


class _Identity(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


BATCH_SIZE = 500


def logits(model: nnx.Module, description: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """What an exported model makes of one batch, computed as in the evaluation of its run.

    Args:
        model: From `exported.load_model`.
        description: Likewise.
        images: uint8 (n, 28, 28); each n is compiled anew.

    Returns:
        float32 (n, 10).
    """
    graphdef, params, model_state = split_model(model)
    normalization = description["normalization"]
    images = features.model_input(description, images)
    return np.asarray(_forward(params, model_state, images, graphdef=graphdef, normalization=normalization))


@functools.partial(jax.jit, static_argnames=("graphdef", "normalization"))
def _forward(
    params: Any, model_state: Any, images: jax.Array, *, graphdef: nnx.GraphDef, normalization: str
) -> jax.Array:
    model = nnx.merge(graphdef, params, model_state, copy=True)
    return model(input_pipeline.normalize(images, normalization)).astype(jnp.float32)


def classify(model: nnx.Module, description: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """Probabilities of the classes, float32 (n, 10): the softmax of `logits`, whose arguments it takes."""
    return np.asarray(jax.nn.softmax(logits(model, description, images)))
