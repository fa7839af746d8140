"""What a trained model says of images."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fmbench.data import features
from fmbench.errors import UserError
from fmbench.models import activations, confidence, split_model
from fmbench.records import schema
from fmbench.training import input_pipeline, parallel

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
    return logits_of_inputs(model, description, features.model_input(description, images))


def logits_of_inputs(model: nnx.Module, description: dict[str, Any], rows: np.ndarray) -> np.ndarray:
    """As `logits`, of the images or, where the model is one on features, of those, (n, num_features)."""
    graphdef, params, model_state = split_model(model)
    return np.asarray(_forward(graphdef, description["normalization"])(params, model_state, rows))


@functools.lru_cache(8)
def _forward(graphdef: nnx.GraphDef, normalization: str) -> Callable[[Any, Any, Any], jax.Array]:
    return jax.jit(functools.partial(forward, graphdef=graphdef, normalization=normalization))


def forward(
    params: Any, model_state: Any, images: jax.Array, *, graphdef: nnx.GraphDef, normalization: str
) -> jax.Array:
    """The logits, float32 (n, 10), of images or rows of features."""
    model = nnx.merge(graphdef, params, model_state, copy=True)
    return model(input_pipeline.normalize(images, normalization)).astype(jnp.float32)


def classify(model: nnx.Module, description: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """Probabilities of the classes, float32 (n, 10), at the model's temperature; takes what `logits` takes."""
    return confidence.probabilities(logits(model, description, images), description.get("temperature") or 1.0)


def make_classifier(model: nnx.Module, description: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """`classify` as a function of images, for many calls: what does not depend on these is done here.

    A call with one image takes a fraction of a `classify` with it, which for a small net is mostly Python.
    """
    graphdef, *states = split_model(model)
    run = _forward(graphdef, description["normalization"])
    params, model_state = in_dtype_of_computation(graphdef, *states)
    temperature = description.get("temperature") or 1.0

    def classifier(images: np.ndarray) -> np.ndarray:
        inputs = features.model_input(description, images)
        return confidence.probabilities(np.asarray(run(params, model_state, inputs)), temperature)

    return classifier


def in_dtype_of_computation(graphdef: nnx.GraphDef, params: Any, model_state: Any) -> tuple[Any, Any]:
    """The same model for inference, whose layers need not convert their parameters at each call."""
    model = nnx.merge(graphdef, params, model_state, copy=True)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear) and layer.dtype is not None:
            layer.kernel.set_value(layer.kernel[...].astype(layer.dtype))
            if layer.bias is not None:
                layer.bias.set_value(layer.bias[...].astype(layer.dtype))
    return split_model(model)[1:]


def measure_confidence(
    model: nnx.Module, description: dict[str, Any], eval_batches: Mapping[str, Sequence[input_pipeline.Batch]]
) -> schema.Confidence:
    """Fits an exported model's temperature on validation images, and measures on the test set what that does.

    Args:
        model: From `exported.load_model`.
        description: Likewise.
        eval_batches: As `input_pipeline.Data` has them; without 'validation' nothing is fitted.
    """
    found = {split: _logits_and_labels(model, description, calls) for split, calls in eval_batches.items()}
    test, labels = found["test"]
    temperature = confidence.fit_temperature(*found["validation"]) if "validation" in found else None
    before, after = (
        confidence.bins(confidence.probabilities(test, t), labels).calibration_error
        for t in (1.0, temperature or 1.0)
    )
    return schema.Confidence(
        calibration_error=before,
        temperature=temperature,
        calibration_error_at_temperature=after if temperature else None,
    )


def _logits_and_labels(
    model: nnx.Module, description: dict[str, Any], calls: Sequence[input_pipeline.Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """Of every real example of a split, float32 (n, 10) and int32 (n,)."""
    batches = [
        {name: array[index] for name, array in call.items()}
        for call in jax.device_get(parallel.local(list(calls)))
        for index in range(len(call["label"]))
    ]
    logits = np.concatenate([logits_of_inputs(model, description, batch["image"]) for batch in batches])
    labels, masks = (np.concatenate([batch[name] for batch in batches]) for name in ("label", "mask"))
    return logits[masks > 0], labels[masks > 0]
