"""Folders that appear whole, outlive a power cut, and tell when they are not as they were written."""

import contextlib
import gc
import hashlib
import json
import re
import shutil
import stat
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from fmbench.system import files

SEAL = "fmbench.json"  # in each folder: [bytes, SHA-256] of every other file below it
ARRAYS = "arrays"


class DamageError(Exception):
    """Something on disk is not as it was written; the message says what of it, and how."""


@contextlib.contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that replaces what is at `path` when the `with` block ends: complete, sealed and on disk.

    Yields:
        Where to write its files. They are removed if anything fails.

    Raises:
        UserError: If they cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with files.one_line(path):
        try:
            files.make_folder(path.parent)
            files.remove(partial)
            partial.mkdir()
            yield partial
            seal(partial)
            for written in (*partial.rglob("*"), partial):
                files.sync(written)
            files.remove(path)
            partial.rename(path)
            files.sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def seal(path: Path) -> None:
    """Notes the size and the digest of every file below a folder."""
    written = {name: [file.stat().st_size, _sha256(file)] for name, file in _entries(path) if name != SEAL}
    (path / SEAL).write_text(json.dumps(written, indent=1))


def check(path: Path) -> None:
    """Checks that a folder is as it was sealed, file by file, before anything in it is parsed.

    Symbolic links are not followed.

    Raises:
        DamageError: If it isn't.
    """
    if path.is_symlink():
        raise DamageError("is a symbolic link, which is not followed")
    if not path.is_dir():
        raise DamageError("is no folder" if path.exists() else "is missing")
    if not (path / SEAL).exists():
        raise DamageError(f"{SEAL}: is missing, as it is where an older version of fmbench wrote")
    try:
        sealed = files.read_json(path / SEAL)
    except ValueError as error:
        raise DamageError(f"{SEAL}: {error}") from error
    try:
        found = dict(_entries(path))
        if added := sorted(found.keys() - sealed.keys() - {SEAL}):
            raise DamageError(f"{added[0]}: was not there when it was written")
        for name, (size, _) in sealed.items():
            if name not in found:
                raise DamageError(f"{name}: is missing")
            status = found[name].lstat()
            if not stat.S_ISREG(status.st_mode):
                raise DamageError(f"{name}: is no plain file")
            if status.st_size != size:
                raise DamageError(f"{name}: has {status.st_size:,} bytes instead of {size:,}")
        for name, (_, sha256) in sealed.items():
            if _sha256(found[name]) != sha256:
                raise DamageError(f"{name}: its content is not what was written")
    except OSError as error:
        raise DamageError(f"{error.filename}: {error.strerror}") from error
    except (TypeError, ValueError) as error:
        raise DamageError(f"{SEAL}: is no list of files") from error


def save_arrays(partial: Path, tree: Any) -> str:
    """Writes a pytree of arrays with Orbax, and returns its digest.

    Raises:
        OSError: If it cannot be written.
    """
    why = ""
    try:
        with _quiet(), _alone():
            ocp.save((partial / ARRAYS).absolute(), tree)
    except Exception as error:  # TensorStore raises ValueError where a disk is full, Orbax what it likes
        why = _reason(error)
    if why:
        gc.collect()  # what `error` held: event loops, which at the process's end would complain
        raise OSError(0, why)
    return _digest(tree)


def load_arrays(path: Path, like: Any, sha256: str) -> Any:
    """Reads what `save_arrays` wrote, laid out like `like`: arrays, or their `jax.ShapeDtypeStruct`s.

    Raises:
        DamageError: If it cannot be read, or has another digest.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    try:
        with _quiet(), _alone():
            tree = ocp.load((path / ARRAYS).absolute(), shapes)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise DamageError(f"{ARRAYS}: {_reason(error)}") from error
    if _digest(tree) != sha256:
        raise DamageError(f"{ARRAYS}: they are not those that were saved")
    return tree


def _entries(path: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a folder but folders, by its name from there."""
    for found in path.rglob("*"):
        if found.is_symlink() or not found.is_dir():
            yield found.relative_to(path).as_posix(), found


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(tree: Any) -> str:
    """SHA-256 of the paths, types, shapes and bytes of a pytree's arrays."""
    sha256 = hashlib.sha256()
    for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        sha256.update(f"{jax.tree_util.keystr(place)} {array.dtype} {array.shape}\n".encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def _alone() -> Any:
    """Lets Orbax take this process for the only one: process 0 alone reads and writes, and has all arrays whole.

    Its own `active_processes` would do, but that before each save all processes compare paths (Orbax 0.12).
    """
    return mock.patch.object(jax, "process_count", lambda: 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax and what it leaves behind from printing what it raises, too: for good after an error."""
    verbosity, hooks, loops = logging.get_verbosity(), (sys.excepthook, sys.unraisablehook), getLogger("asyncio")

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread() or not _is_of_asyncio(trace):
            hooks[0](kind, error, trace)

    def unraisablehook(unraisable: Any) -> None:
        if not _is_of_asyncio(unraisable.exc_traceback):
            hooks[1](unraisable)

    logging.set_verbosity(logging.FATAL)
    sys.excepthook, sys.unraisablehook, loops.disabled = excepthook, unraisablehook, True
    try:
        yield
    except BaseException:
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise
    logging.set_verbosity(verbosity)
    sys.excepthook, sys.unraisablehook = hooks
    loops.disabled = False


def _is_of_asyncio(trace: TracebackType | None) -> bool:
    """Whether an event loop raised it: TensorStore's threads find it closed, or it was never quite open."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("asyncio.")


def _reason(error: Exception) -> str:
    """What the operating system told TensorStore, or else the first line of what may be pages."""
    told = re.search(r"([^:]+) \[os_error_code", str(error))
    return told[1].strip() if told else next(iter(str(error).splitlines()), type(error).__name__)[:300]
