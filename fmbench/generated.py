"""Generated files: what belongs in them is rendered first, then written or compared with what is there."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fmbench import results
from fmbench.errors import UserError


def between_marks(path: Path, marks: tuple[str, str], parts: Sequence[str]) -> dict[Path, str]:
    """The file with `parts`, apart by empty lines, in the place of what stands between its two marks.

    Returns:
        Path and text; nothing, if there is no such file or it has no marks.

    Raises:
        UserError: If the marks are not in order.
    """
    text = path.read_bytes().decode() if path.exists() else ""
    if not any(mark in text for mark in marks):
        return {}
    before, _, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end or any(text.count(mark) > 1 for mark in marks):
        raise UserError(f"{path}: needs {marks[0]} and, below it, {marks[1]}, once each.")
    return {path: before + "\n\n".join([marks[0], *parts, marks[1]]) + after}


def write(files: Mapping[Path, str]) -> None:
    """Writes every file, each atomically."""
    for path, text in files.items():
        with results.atomic_file(path) as file:
            file.write(text.encode())


def stale(files: Mapping[Path, str]) -> list[Path]:
    """The files that are missing or not what they should be."""
    return [path for path, text in files.items() if not path.exists() or path.read_bytes() != text.encode()]
