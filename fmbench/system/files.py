"""Where fmbench keeps files of its own, how it writes them, and how it reads what others may have damaged."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fmbench.errors import UserError
from fmbench.system.places import local_path

UNFINISHED = ".unfinished"  # how the names end of files that are being written
LARGEST_TEXT = 64 << 20  # bytes; the history of 10,000 epochs is smaller


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears under `path` whole, at the end of the `with` block, or not at all.

    It outlives a power cut. An OSError names `path`.
    """
    try:
        with _unfinished(path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                # A temporary file is its owner's alone; a result is everyone's to read.
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
                sync(path.parent)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        if not error.filename or str(error.filename).endswith(UNFINISHED):  # of which nobody knows
            error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some file systems sync no folders, and a folder may be writable but not readable.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
            raise


def sweep(folder: Path) -> None:
    """Removes the files that killed processes did not finish."""
    for left in folder.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _unfinished(path: Path) -> IO[bytes]:
    """A new file beside `path`, locked as long as its process lives; those of processes that were killed go."""
    sweep(path.parent)
    while True:
        new = tempfile.NamedTemporaryFile(  # noqa: SIM115
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED, delete=False
        )
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is taken for left
            fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(new.fileno()).st_nlink:  # not taken for left before it was locked
            return new
        new.close()


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, so that they outlive a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one; of a symbolic link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_line(place: Path) -> Iterator[None]:
    """Makes a user's matter of what the machine refuses: no room, no permission, too few file handles.

    Raises:
        UserError: Instead of an OSError; names the file, or else `place`.
    """
    try:
        yield
    except (BrokenPipeError, FileNotFoundError):  # of who reads what is printed; of a current folder that is gone
        raise
    except OSError as error:
        raise UserError(
            f"{error.filename or place}: {error.strerror or error}; when that is mended, the same command goes on."
        ) from error


def read_text(path: Path) -> str:
    """Reads a file that may be anything by now.

    Raises:
        ValueError: If it is no text of reasonable size; says why, without the path.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no plain file")
        if status.st_size > LARGEST_TEXT:
            raise ValueError(f"has {status.st_size:,} bytes, too many")
        return path.read_bytes().decode()
    except OSError as error:
        raise ValueError(error.strerror) from error
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object from a file that may be anything by now.

    Raises:
        ValueError: If there is none; says why, without the path.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("is no JSON of ours: too deep") from error
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object")
    return content


# The cache: proven arrays, decoded once.


def cache_directory() -> Path:
    """`$FMBENCH_CACHE`, else `fmbench` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        UserError: If there is no such place: this user has no home folder, perhaps, as in containers.
    """
    named = os.environ.get("FMBENCH_CACHE")
    try:
        return local_path(named or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/fmbench")
    except UserError as error:
        raise UserError(f"there is no place for the cache: {error} FMBENCH_CACHE may name another.") from error
