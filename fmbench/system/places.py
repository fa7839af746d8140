"""How people spell places on this machine."""

import os
from pathlib import Path

from fmbench.errors import UserError


def local_path(text: str | os.PathLike[str]) -> Path:
    """The file or folder that is meant by './x', '~/x' or '~user/x'.

    Raises:
        UserError: If it is none on this machine: '', gs://x, file:///x, the home of somebody who has none.
    """
    spelt = os.fspath(text)
    if not spelt:
        raise UserError("'' names no place; a folder in the current one is called like x or ./x.")
    if "\0" in spelt:
        raise UserError(f"{spelt!r} has a NUL in it, which no path can have.")
    if "://" in spelt or spelt.startswith("file:"):
        raise UserError(
            f"'{spelt}' is no path on this machine; name one like /x, where what lies there is mounted."
        )
    expanded = os.path.expanduser(spelt)  # noqa: PTH111  (that of pathlib raises RuntimeError)
    if expanded.startswith("~"):
        home = spelt.partition("/")[0]
        raise UserError(f"'{spelt}': there is no home folder '{home}'; if a file is called so, write './{spelt}'.")
    return Path(expanded)
