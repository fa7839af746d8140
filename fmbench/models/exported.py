"""A trained model on disk, which a fresh process can rebuild, and prove to be what was written."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import psutil
from flax import nnx
from jax.sharding import SingleDeviceSharding
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmbench.errors import UserError
from fmbench.models import build_model, split_model
from fmbench.system import files, sealed
from fmbench.system.sealed import DamageError


class Model(BaseModel):
    """config.model: a name or an import path, and the constructor's arguments."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str


class Features(BaseModel):
    """config.features."""

    model_config = ConfigDict(extra="forbid", strict=True)

    backbone: Literal["", "efficientnet_lite0", "vgg19"]
    weights: str
    image_size: Annotated[int, Field(ge=32, le=4096)]
    preprocessing: Literal["imagenet", "rescaled_twice"]


class Description(BaseModel):
    """What model.json holds."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Model
    dtype: Literal["float32", "bfloat16"]
    normalization: Literal["unit", "symmetric", "standard", "none"]
    class_names: Annotated[list[str], Field(min_length=10, max_length=10)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of the arrays
    entry: str = ""
    seed: int | None = None
    features: Features | None = None
    test_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None  # of probabilities, fitted on validation


def export_model(directory: Path, params: Any, model_state: Any, description: dict[str, Any]) -> None:
    """Writes a model that `load_model` can rebuild in a fresh process, whole or not at all.

    Args:
        directory: Replaced if it exists.
        params: Trainable parameters.
        model_state: Batch-norm statistics.
        description: JSON; `model` is config.model: the name in MODELS or the import path, and the arguments;
            `dtype` is the type of the computation.

    Raises:
        UserError: If it cannot be written.
    """
    with sealed.sealed_folder(directory) as partial:
        sha256 = sealed.save_arrays(partial, {"params": params, "model_state": model_state})
        text = json.dumps(description | {"sha256": sha256}, indent=1)
        (partial / "model.json").write_text(text + "\n")


def add_temperature(directory: Path, temperature: float) -> None:
    """Writes an exported model anew, whole or not at all, with the temperature in its description.

    Raises:
        UserError: If it cannot be written.
    """
    with sealed.sealed_folder(directory) as partial:
        shutil.copytree(directory / sealed.ARRAYS, partial / sealed.ARRAYS)
        description = files.read_json(directory / "model.json") | {"temperature": temperature}
        (partial / "model.json").write_text(json.dumps(description, indent=1) + "\n")


def check_export(directory: Path) -> dict[str, Any]:
    """The description of an exported model of which every file is as it was written.

    Raises:
        DamageError: If it isn't; names the file.
    """
    sealed.check(directory)
    try:
        return Description.model_validate(files.read_json(directory / "model.json")).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DamageError(f"model.json: field '{field}': {first['msg']}") from error
    except ValueError as error:
        raise DamageError(f"model.json: {error}") from error


def load_model(directory: Path) -> tuple[nnx.Module, dict[str, Any]]:
    """Rebuilds an exported model, and proves that its numbers are those that were exported.

    Where its class lies outside of fmbench, the module that `model.json` names is imported, which runs what is in
    it. Only modules that Python finds are, the current folder's among them, and only an `nnx.Module` is called.

    Args:
        directory: An exported model, or a work directory with one.

    Returns:
        The model and its description.

    Raises:
        UserError: If there is no model, or it is damaged, not of this version, or its class is not at hand.
    """
    if (directory / "model").is_dir():
        directory = directory / "model"
    if not (directory / "model.json").is_file():
        raise UserError(f"{directory} holds no exported model; name the work directory of a completed run.")
    try:
        description = check_export(directory)
        dtype = jnp.dtype(description["dtype"])
        model = nnx.eval_shape(lambda: build_model(description["model"], rngs=nnx.Rngs(0), dtype=dtype))
        graphdef, params, model_state = split_model(model)
        device = SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            {"params": params, "model_state": model_state},
        )
        num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        if num_bytes > psutil.virtual_memory().total:
            raise DamageError(
                f"model.json: field 'model': {num_bytes:,} bytes of parameters, more than the memory"
            )
        saved = sealed.load_arrays(directory, shapes, description["sha256"])
    except DamageError as damage:
        raise UserError(
            f"{directory} holds no model of this version of fmbench, or a damaged one ({damage}); the command "
            "that trained it exports it again."
        ) from damage
    except UserError as error:
        raise UserError(f"{directory} holds a model that cannot be rebuilt here: {error}") from error
    return nnx.merge(graphdef, saved["params"], saved["model_state"]), description
