"""Saving and restoring a run, with Orbax v1."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fmbench.errors import UserError
from fmbench.system import files, sealed
from fmbench.system.sealed import DamageError

State = TypeVar("State")


class Checkpoints:
    """The checkpoints of a run, of which the latest two are kept: where one is damaged, there is another.

    Args:
        directory: Created by the first save, if absent.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._latest: Path | None = None  # that is known to be good

    def restore(
        self, state: State, misfit: Callable[[dict[str, Any]], str] = lambda progress: ""
    ) -> tuple[State, dict[str, Any]] | None:
        """The latest good checkpoint, laid out like `state`, and its progress; None if there is none at all.

        A newer one that is damaged is named on standard error.

        Args:
            state: Arrays on the devices where they are to be.
            misfit: Says of the progress of another run's checkpoint how it differs.

        Raises:
            UserError: If there are checkpoints, and all of them are damaged.
        """
        refused = []
        for path in newest_first(self._directory):
            try:
                content = _read(path)
                if difference := misfit(content["progress"]):
                    raise DamageError(difference)
                restored = sealed.load_arrays(path, state, content["state_sha256"])
            except DamageError as damage:
                refused.append(f"{path}: {damage}")
                continue
            for line in refused:
                print(f"{line}; an older checkpoint is taken, {path.name}.", file=sys.stderr)
            self._latest = path
            return restored, content["progress"]
        if refused:
            raise UserError(f"no checkpoint is good: {'; '.join(refused)}. --force starts anew.")
        return None

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Returns when the checkpoint is on disk, and only it and the one before are left.

        The step that was restored, because the run was stopped before it did another, is left as it is.

        Args:
            step: Steps done.
            state: Any pytree of arrays.
            progress: What resuming needs beside the state, as JSON.

        Raises:
            UserError: If it cannot be written; those before are left.
        """
        path = self._directory / str(step)
        if path == self._latest:
            return
        with sealed.sealed_folder(path) as partial:
            content = {"step": step, "state_sha256": sealed.save_arrays(partial, state), "progress": progress}
            (partial / "progress.json").write_text(json.dumps(content, indent=1))
        for old in (*newest_first(self._directory), *self._directory.glob(".*.partial")):
            if old not in (path, self._latest):
                files.remove(old)
        self._latest = path


def newest_first(directory: Path) -> list[Path]:
    """What may be checkpoints, the latest first; nothing is known of them yet."""
    if directory.is_symlink():
        raise UserError(f"{directory} is a symbolic link, which is not followed; --force starts anew.")
    if not directory.is_dir():
        return []
    steps = [path for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(steps, key=lambda path: int(path.name), reverse=True)


def read_progress(path: Path) -> dict[str, Any]:
    """What `Checkpoints.save` was given beside the state.

    Raises:
        DamageError: If anything of the checkpoint is.
    """
    return _read(path)["progress"]


def _read(path: Path) -> dict[str, Any]:
    sealed.check(path)
    try:
        content = files.read_json(path / "progress.json")
        if not (isinstance(content["progress"], dict) and isinstance(content["state_sha256"], str)):
            raise ValueError("lacks what resuming needs")
        if content["step"] != int(path.name):
            raise ValueError(f"is of step {content['step']}")
    except (ValueError, KeyError) as error:
        raise DamageError(f"progress.json: {error}") from error
    return content
