"""A run's work directory: whose it is, whether it is finished, and that nobody else writes to it."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from fmbench import config as config_lib
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.records.schema import RunRecord, predictions_sha256
from fmbench.system import files, sealed
from fmbench.training import checkpoint

LOCK = ".fmbench.lock"
# All that runs leave, and nothing else is ever removed.
LEFT_BY_RUNS = re.compile(
    r"\.lock|\.fmbench\.lock|config\.json|data\.json|processes\.json|trackers\.json|\.pulse|metrics\.jsonl|figures|seed\d+|"
    r"record\.(json|npy|validation\.npy)|checkpoints|tensorboard|\.?model(\.partial)?|"
    r"\.(config|data|metrics|processes|record|trackers)\.[.a-z]+\.[a-z0-9_]{8}\.unfinished"
)


@contextlib.contextmanager
def claim(workdir: Path, config: dict[str, Any], *, force: bool) -> Iterator[None]:
    """Opens `workdir` for a run of `config` and keeps other processes out.

    A run that fails before it has left something to go on from leaves nothing.

    Args:
        workdir: Created if absent.
        config: The resolved config as JSON. The first run stores it; once it has left something to go on from,
            later ones must have the same, but for data.dir where the data are equal wherever they lie: proven to
            be, or with the hashes that `check_same_data` stored.
        force: Throw away what an earlier run left there.

    Raises:
        UserError: If the directory holds something else, a run of another config, or a running one; or config.json
            is damaged, and no checkpoint can tell whose run it is; or it is a symbolic link, or has one in the
            place of what a run writes: it may lead to somebody else's files.
    """
    stored = workdir / "config.json"
    if os.fsencode(workdir.absolute()) != str(workdir.absolute()).encode(errors="replace"):
        raise UserError(
            f"--workdir={workdir}: its full name is not UTF-8, which checkpoints need; name another, or set "
            "PYTHONUTF8=1 if it is."
        )
    made = [path for path in (workdir, *workdir.parents) if not os.path.lexists(path)]
    try:
        if workdir.is_symlink():
            raise UserError(f"--workdir={workdir} is a link; name what it leads to, {workdir.readlink()}.")
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is a file; name a directory.")
        if workdir.exists() and not _is_free(workdir) and not _is_run(workdir):
            raise UserError(f"--workdir={workdir} holds files that are not a run's; name an empty directory.")
        links = [path.name for path in workdir.iterdir() if path.is_symlink()] if workdir.exists() else []
        if not force and (ours := list(filter(LEFT_BY_RUNS.fullmatch, links))):
            raise UserError(
                f"--workdir={workdir} has a link where a run has files of its own ({ours[0]}); --force removes it."
            )
        files.make_folder(workdir)
        lock = filelock.FileLock(workdir / LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"--workdir={workdir} is in use by another run; wait for it.") from error
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}.") from error
    with lock:
        for folder in (workdir, *workdir.glob("seed*")):
            files.sweep(folder)
        if force or _is_untrained(workdir):
            _clear(workdir)
        if not _left_by_runs(workdir) - {".lock", LOCK}:
            _write_json(stored, config)
        else:
            _check_same(workdir, config)
        try:
            yield
        except BaseException:
            if _is_untrained(workdir):
                _clear(workdir)
                (workdir / LOCK).unlink()
                with contextlib.suppress(OSError):  # somebody else's file is there
                    for path in made:
                        path.rmdir()
            raise


def check_same_data(workdir: Path, sha256: dict[str, str]) -> None:
    """Stores the hashes of the data when the first run has loaded them, and compares those of later ones.

    A damaged file of them is written anew: each checkpoint has them, too.

    Raises:
        UserError: If the run that `workdir` holds was begun on other data.
    """
    stored = workdir / "data.json"
    if not stored.exists():
        _write_json(stored, sha256)
        return
    try:
        damage = "is not what the checkpoints say" if files.read_json(stored) != sha256 else ""
        is_read = True
    except ValueError as error:
        damage, is_read = str(error), False
    if damage:
        if is_read and not any(progress.get("data_sha256") == sha256 for progress in _proven(workdir)):
            raise UserError(
                f"--workdir={workdir} holds a run on other data than these. Name another directory, or give "
                "--force to start anew there."
            )
        _repair(stored, damage, sha256)


def misfit(progress: dict[str, Any], config: dict[str, Any], sha256: dict[str, str]) -> str:
    """How the progress of a checkpoint is not that of a run of `config` on data with these hashes; '' if it is."""
    if difference := _difference(progress.get("config", {}), config, but_for_dir=True):
        return f"is another run's ({difference})"
    return "" if progress.get("data_sha256") == sha256 else "is of a run on other data"


def is_finished(workdir: Path) -> bool:
    """Whether the run in `workdir` is completed: it left a record, and the predictions that go with it."""
    return _finished_record(workdir) is not None


def is_of(workdir: Path, predictions: np.ndarray) -> bool:
    """Whether the run in `workdir` is completed, and its record is one of these predictions of the test set."""
    record = _finished_record(workdir)
    return record is not None and record.predictions_sha256 == predictions_sha256(predictions)


def _finished_record(workdir: Path) -> RunRecord | None:
    try:
        record = store.read(workdir / "record.json")
        if record.status == "completed":
            store.read_predictions(record, workdir / "record.npy")
            if record.val_predictions_sha256:
                store.read_val_predictions(record, workdir / "record.validation.npy")
            return record
    except UserError:
        pass  # no record yet, or a damaged one: the last checkpoint gives it again
    return None


def _is_free(workdir: Path) -> bool:
    # A process killed at its very start leaves the lock, and perhaps an unfinished config.json.
    ours = re.compile(r"\.fmbench\.lock|\.config\.json\.[a-z0-9_]{8}\.unfinished")
    return all(ours.fullmatch(path.name) for path in workdir.iterdir())


def _is_untrained(workdir: Path) -> bool:
    """Whether earlier runs left nothing but what they say of themselves: they ended with an error, perhaps."""
    return _left_by_runs(workdir) <= {".lock", LOCK, "config.json", "data.json"}


def _left_by_runs(workdir: Path) -> set[str]:
    return {path.name for path in workdir.iterdir() if LEFT_BY_RUNS.fullmatch(path.name)}


def _is_run(workdir: Path) -> bool:
    """Whether these are a run's: by its config.json, or where that is damaged, by what only runs leave."""
    with contextlib.suppress(ValueError):
        # Other programs have files of that name, too.
        if {"entry", "config_file", "data"} <= files.read_json(workdir / "config.json").keys():
            return True
    with contextlib.suppress(ValueError):
        if "t10k-labels" in files.read_json(workdir / "data.json"):
            return True
    return any((path / sealed.SEAL).exists() for path in (workdir / "model", *workdir.glob("checkpoints/*")))


def _check_same(workdir: Path, config: dict[str, Any]) -> None:
    """Compares with the config of the run, which a checkpoint has as well, should config.json be damaged."""
    stored = workdir / "config.json"
    try:
        old = files.read_json(stored)
        is_moved = config["data"]["source"] == "tfds" or _only_moved(workdir, old["data"], config["data"])
        difference = _difference(old, config, but_for_dir=is_moved)
        if not difference:
            return
        damage = "is not what the checkpoints say"
    except (ValueError, TypeError, KeyError) as error:
        difference, damage = "", str(error)
    for progress in _proven(workdir):
        if not _difference(progress.get("config", {}), config, but_for_dir=not difference):
            _repair(stored, damage, config)
            return
    if difference:
        raise UserError(
            f"--workdir={workdir} holds a run of another config ({difference}). Name another directory, or give "
            "--force to start anew there."
        )
    raise UserError(
        f"{stored}: {damage}, and no checkpoint is good and of this config. Name another directory, or give "
        "--force to start anew there."
    )


def _difference(old: dict[str, Any], new: dict[str, Any], *, but_for_dir: bool) -> str:
    old, new = config_lib.complete(old), config_lib.flatten(new)
    if but_for_dir:
        old, new = old | {"data.dir": None}, new | {"data.dir": None}
    return config_lib.difference(old, new)


def _proven(workdir: Path) -> Iterator[dict[str, Any]]:
    """The progress of good checkpoints, of whatever run."""
    for path in checkpoint.newest_first(workdir / "checkpoints"):
        with contextlib.suppress(sealed.DamageError):
            yield checkpoint.read_progress(path)


def _repair(path: Path, damage: str, content: dict[str, Any]) -> None:
    print(f"{path}: {damage}; written anew.", file=sys.stderr)
    files.remove(path)
    _write_json(path, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with files.atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _only_moved(workdir: Path, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the data lie elsewhere than they did, and are the same."""
    if old["dir"] == new["dir"] or not new["dir"] or not (workdir / "data.json").exists():
        return False
    check_same_data(workdir, fashion_mnist.of_config(new).sha256)
    return True


def _clear(workdir: Path) -> None:
    # config.json goes last: without it the rest would no longer be known as a run's.
    for path in sorted(workdir.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name != LOCK and LEFT_BY_RUNS.fullmatch(path.name):
            files.remove(path)
