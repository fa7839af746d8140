"""Where fmbench keeps files of its own, and how it writes them."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears under `path` whole, at the end of the `with` block, or not at all."""
    with _unfinished(path) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # A temporary file is its owner's alone; a result is everyone's to read.
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _unfinished(path: Path) -> IO[bytes]:
    """A new file beside `path`, locked as long as its process lives; those of processes that were killed go."""
    for left in path.parent.glob(".*.unfinished"):
        with contextlib.suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    while True:
        new = tempfile.NamedTemporaryFile(  # noqa: SIM115
            dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished", delete=False
        )
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is taken for left
            fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(new.fileno()).st_nlink:  # not taken for left before it was locked
            return new
        new.close()


# The cache: proven arrays, decoded once.


def cache_directory() -> Path:
    """`$FMBENCH_CACHE`, else `fmbench` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if cache := os.environ.get("FMBENCH_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fmbench"
