"""A trained model as a pure function of its arrays and of images."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmbench.errors import UserError
from fmbench.models import exported, split_model
from fmbench.training import input_pipeline


class Program(NamedTuple):
    """What is exported: grey levels in, logits out."""

    arrays: dict[str, np.ndarray]  # by flat name: 'blocks.0.conv1.kernel'
    call: Callable[[Sequence[Any], jax.Array], jax.Array]  # (arrays' values, uint8 (n, 28, 28)) -> float32 (n, 10)
    description: dict[str, Any]  # the exported model's
    model: nnx.Module


def load(workdir: Path) -> Program:
    """The exported model of a work directory; raises as `exported.load_model`."""
    return of(*exported.load_model(workdir))


def of(model: nnx.Module, description: dict[str, Any]) -> Program:
    """A model with its description as `exported.load_model` returns them."""
    graphdef, params, model_state = split_model(model)
    leaves, structure = jax.tree_util.tree_flatten_with_path((params, model_state))

    def call(arrays: Sequence[Any], images: jax.Array) -> jax.Array:
        merged: Any = nnx.merge(graphdef, *jax.tree.unflatten(structure, arrays), copy=True)
        return merged(input_pipeline.normalize(images, description["normalization"])).astype(jnp.float32)

    arrays = {".".join(str(key.key) for key in path[1:]): np.asarray(leaf) for path, leaf in leaves}
    assert len(arrays) == len(leaves)  # a module has no two attributes of one name
    return Program(arrays, call, description, model)


def specification() -> jax.ShapeDtypeStruct:
    """Of the images: uint8 (batch, 28, 28), of any batch."""
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 28, 28"), jnp.uint8)


@contextlib.contextmanager
def refused(format: str) -> Iterator[None]:
    """Around what may fail for a net of somebody else's, in JAX or in a runtime, which raise many kinds.

    Raises:
        UserError: Instead; says why in one line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--format={format} does not take this model: {said}") from error


def refuse_features(program: Program, format: str) -> None:
    """Refuses what is no function of images alone.

    Raises:
        UserError: If the model is a head on a frozen net's features.
    """
    if backbone := (program.description.get("features") or {}).get("backbone"):
        raise UserError(
            f"--format={format} takes models of images, and this one is a head on the features of {backbone}; "
            "--format=safetensors has its weights."
        )
