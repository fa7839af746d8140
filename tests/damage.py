"""Ways in which files come to harm."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def _flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "delete": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flip": _flip,
    "extend": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "announce 4 TiB": lambda path: os.truncate(path, 1 << 42),
    "folder": lambda path: _replace(path, Path.mkdir),
    "fifo": lambda path: _replace(path, os.mkfifo),
}
OF_EMPTY_FILES = ("delete", "extend", "announce 4 TiB", "folder", "fifo")  # on which the others have no effect


def cases(folder: Path) -> Iterator[tuple[str, str]]:
    """The names of every file below a folder, each with every way of harming it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            for mode in DAMAGE if path.stat().st_size else OF_EMPTY_FILES:
                yield path.relative_to(folder).as_posix(), mode
