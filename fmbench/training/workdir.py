"""A run's work directory: whose it is, whether it is finished, and that nobody else writes to it."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from fmbench import config as config_lib
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.system import files

LOCK = ".fmbench.lock"
# All that runs leave, and nothing else is ever removed. Temporary files have names of their own, of `tempfile`.
LEFT_BY_RUNS = re.compile(
    r"\.lock|\.fmbench\.lock|config\.json|data\.json|metrics\.jsonl|record\.(json|npy|validation\.npy)|checkpoints|"
    r"tensorboard|model|model\.partial|figures|seed\d+|\.(config|data|metrics|record)\.[.a-z]+\.[a-z0-9_]{8}"
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
        UserError: If the directory holds something else, a run of another config, or a running one; or it is a
            symbolic link, or has one in the place of what a run writes: it may lead to somebody else's files.
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
        if workdir.exists() and not _is_free(workdir) and not _is_config(stored):
            raise UserError(f"--workdir={workdir} holds files that are not a run's; name an empty directory.")
        links = [path.name for path in workdir.iterdir() if path.is_symlink()] if workdir.exists() else []
        if not force and (ours := list(filter(LEFT_BY_RUNS.fullmatch, links))):
            raise UserError(
                f"--workdir={workdir} has a link where a run has files of its own ({ours[0]}); --force removes it."
            )
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / LOCK)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"--workdir={workdir} is in use by another run; wait for it.") from error
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error.strerror}.") from error
    with lock:
        if force or _is_untrained(workdir):
            _clear(workdir)
        if stored.exists():
            _check_same(workdir, json.loads(stored.read_text()), config)
        else:
            with files.atomic_file(stored) as file:
                file.write(json.dumps(config, indent=1).encode())
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

    Raises:
        UserError: If the run that `workdir` holds was begun on other data.
    """
    stored = workdir / "data.json"
    if not stored.exists():
        with files.atomic_file(stored) as file:
            file.write(json.dumps(sha256, indent=1).encode())
    elif json.loads(stored.read_text()) != sha256:
        raise UserError(
            f"--workdir={workdir} holds a run on other data than these. Name another directory, or give "
            "--force to start anew there."
        )


def is_finished(workdir: Path) -> bool:
    """Whether the run in `workdir` is completed: it left a record, and the predictions that go with it."""
    try:
        record = store.read(workdir / "record.json")
        if record.status == "completed":
            store.read_predictions(record, workdir / "record.npy")
            if record.val_predictions_sha256:
                store.read_val_predictions(record, workdir / "record.validation.npy")
            return True
    except UserError:
        pass  # no record yet, or a damaged one: the last checkpoint gives it again
    return False


def _is_free(workdir: Path) -> bool:
    # A process killed at its very start leaves the lock, and perhaps an unfinished config.json.
    ours = re.compile(r"\.fmbench\.lock|\.config\.json\.[a-z0-9_]{8}")
    return all(ours.fullmatch(path.name) for path in workdir.iterdir())


def _is_untrained(workdir: Path) -> bool:
    """Whether earlier runs left nothing but what they say of themselves: they ended with an error, perhaps."""
    left = {path.name for path in workdir.iterdir() if LEFT_BY_RUNS.fullmatch(path.name)}
    return left <= {".lock", LOCK, "config.json", "data.json"}


def _is_config(path: Path) -> bool:
    """Whether this is a run's config.json; other programs have files of that name, too."""
    try:
        return {"entry", "config_file", "data"} <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _check_same(workdir: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if new["data"]["source"] == "tfds" or _only_moved(workdir, old["data"], new["data"]):
        old = old | {"data": old["data"] | {"dir": None}}
        new = new | {"data": new["data"] | {"dir": None}}
    if difference := config_lib.difference(config_lib.complete(old), new):
        raise UserError(
            f"--workdir={workdir} holds a run of another config ({difference}). Name another directory, or give "
            "--force to start anew there."
        )


def _only_moved(workdir: Path, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the data lie elsewhere than they did, and are the same."""
    if old["dir"] == new["dir"] or not new["dir"] or not (workdir / "data.json").exists():
        return False
    check_same_data(workdir, fashion_mnist.load(new["source"], new["dir"], new["unproven"]).sha256)
    return True


def _clear(workdir: Path) -> None:
    # config.json goes last: without it the rest would no longer be known as a run's.
    for path in sorted(workdir.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name == LOCK or not LEFT_BY_RUNS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
