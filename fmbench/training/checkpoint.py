"""Saving and restoring a run, and exporting its final model, with Orbax v1."""

import functools
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

State = TypeVar("State")
policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of a run, of which the latest is kept.

    Args:
        directory: Created by the first save, if absent.
    """

    def __init__(self, directory: Path):
        self._directory = directory.resolve()
        self._saving: Any = None

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.LatestN(1),
            cleanup_tmp_directories=True,
        )

    def restore(self, state: State) -> tuple[State, dict[str, Any]] | None:
        """The latest checkpoint, laid out like `state`, and its progress; None if there is none."""
        latest = self._checkpointer.latest if self._directory.exists() else None
        if latest is None:
            return None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        metadata = self._checkpointer.metadata(latest.step)
        return self._checkpointer.load(latest.step, shapes), metadata.custom_metadata

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied before this returns, the writing goes on behind.

        A step that is saved already, because the run was stopped before it did another, is left as it is.

        Args:
            step: Steps done.
            state: Any pytree of arrays.
            progress: What resuming needs beside the state, as JSON.
        """
        if self._checkpointer.latest and self._checkpointer.latest.step == step:
            return
        self._saving = self._checkpointer.save_async(step, state, custom_metadata=progress)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        """Waits, then lets go."""
        self._checkpointer.close()
