"""A trained model on disk, which a fresh process can rebuild."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from fmbench.errors import UserError
from fmbench.models import build_model, split_model


def export_model(directory: Path, params: Any, model_state: Any, description: dict[str, Any]) -> None:
    """Writes a model that `load_model` can rebuild in a fresh process, whole or not at all.

    Args:
        directory: Replaced if it exists.
        params: Trainable parameters.
        model_state: Batch-norm statistics.
        description: JSON; `model` is config.model: the name in MODELS or the import path, and the arguments;
            `dtype` is the type of the computation.
    """
    partial = directory.with_name(directory.name + ".partial").resolve()
    shutil.rmtree(partial, ignore_errors=True)
    ocp.save(partial, {"params": params, "model_state": model_state})
    (partial / "model.json").write_text(json.dumps(description, indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def load_model(directory: Path) -> tuple[nnx.Module, dict[str, Any]]:
    """Rebuilds an exported model.

    Where its class lies outside of fmbench, the module that `model.json` names is imported, which runs what is in
    it. Only modules that Python finds are, the current folder's among them, and only an `nnx.Module` is called.

    Args:
        directory: An exported model, or a work directory with one.

    Returns:
        The model and its description.

    Raises:
        UserError: If there is no model, not of this version of fmbench, or its class is not at hand.
    """
    if (directory / "model").is_dir():
        directory = directory / "model"
    if not (directory / "model.json").is_file():
        raise UserError(f"{directory} holds no exported model; name the work directory of a completed run.")
    try:
        description = json.loads((directory / "model.json").read_text())
        if missing := {"normalization", "class_names"} - description.keys():
            raise KeyError(*missing)
        dtype = jnp.dtype(description["dtype"])
        model = nnx.eval_shape(lambda: build_model(description["model"], rngs=nnx.Rngs(0), dtype=dtype))
    except UserError as error:
        raise UserError(f"{directory} holds a model that cannot be rebuilt here: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory} holds no model of this version of fmbench ({type(error).__name__}: {error}); "
            "export it again."
        ) from error
    graphdef, params, model_state = split_model(model)
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        {"params": params, "model_state": model_state},
    )
    try:
        saved = ocp.load(directory.resolve(), shapes)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise UserError(f"{directory} is damaged: {error}. Export it again.") from error
    return nnx.merge(graphdef, saved["params"], saved["model_state"]), description
