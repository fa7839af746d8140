"""Saving and restoring a run, and exporting its final model, with Orbax v1."""

import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from fmbench.errors import UserError
from fmbench.models import MODELS, split_arguments, split_model

State = TypeVar("State")
policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of a run: the latest and the best on validation.

    Args:
        directory: Created if absent.
    """

    def __init__(self, directory: Path):
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["val_accuracy"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None

    def restore(self, state: State) -> tuple[State, dict[str, Any]] | None:
        """The latest checkpoint, laid out like `state`, and its progress; None if there is none."""
        latest = self._checkpointer.latest
        if latest is None:
            return None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        metadata = self._checkpointer.metadata(latest.step)
        return self._checkpointer.load(latest.step, shapes), metadata.custom_metadata

    def save(self, step: int, state: Any, progress: dict[str, Any], val_accuracy: float | None) -> None:
        """Starts saving; the arrays are copied before this returns, the writing goes on behind.

        A step that is saved already, because the run was stopped before it did another, is left as it is.

        Args:
            step: Steps done.
            state: Any pytree of arrays.
            progress: What resuming needs beside the state, as JSON.
            val_accuracy: By which the best is chosen, or None if validation was not evaluated at this step.
        """
        if self._checkpointer.latest and self._checkpointer.latest.step == step:
            return
        metrics = None if val_accuracy is None else {"val_accuracy": val_accuracy}
        self._saving = self._checkpointer.save_async(step, state, metrics=metrics, custom_metadata=progress)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        """Waits, then lets go."""
        self._checkpointer.close()


def export_model(directory: Path, params: Any, model_state: Any, description: dict[str, Any]) -> None:
    """Writes a model that `load_model` can rebuild in a fresh process, whole or not at all.

    Args:
        directory: Replaced if it exists.
        params: Trainable parameters.
        model_state: Batch-norm statistics.
        description: JSON; `model` holds the name in MODELS and the arguments, `dtype` the type of the computation.
    """
    partial = directory.with_name(directory.name + ".partial").resolve()
    shutil.rmtree(partial, ignore_errors=True)
    ocp.save(partial, {"params": params, "model_state": model_state})
    (partial / "model.json").write_text(json.dumps(description, indent=1) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def load_model(directory: Path) -> tuple[nnx.Module, dict[str, Any]]:
    """Rebuilds an exported model.

    Args:
        directory: An exported model, or a work directory with one.

    Returns:
        The model and its description.

    Raises:
        UserError: If there is no model, or not of this version of fmbench.
    """
    if (directory / "model").is_dir():
        directory = directory / "model"
    if not (directory / "model.json").is_file():
        raise UserError(f"{directory} holds no exported model; name the work directory of a completed run.")
    try:
        description = json.loads((directory / "model.json").read_text())
        if missing := {"normalization", "class_names"} - description.keys():
            raise KeyError(*missing)
        name, arguments = split_arguments(description["model"])
        dtype = jnp.dtype(description["dtype"])
        model = nnx.eval_shape(lambda: MODELS[name](rngs=nnx.Rngs(0), dtype=dtype, **arguments))
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
