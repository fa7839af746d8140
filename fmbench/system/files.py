"""Where fmbench keeps files of its own, and how it writes them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fmbench.errors import UserError
from fmbench.system.places import local_path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears under `path` whole, at the end of the `with` block, or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
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
