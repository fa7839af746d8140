"""Fashion-MNIST as Kaggle's two CSV files: a header `label,pixel1,...,pixel784`, then a row per image.

Like `sources.py`, nothing here decides which images they are; `proof.py` does. Kaggle's own files hold
the old Fashion-MNIST, withdrawn on 2017-08-31.
Source: https://www.kaggle.com/datasets/zalando-research/fashionmnist.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fmbench.data import sources
from fmbench.errors import UserError

FILE_NAMES = {"train": "fashion-mnist_train.csv", "t10k": "fashion-mnist_test.csv"}
COLUMNS = ("label", *(f"pixel{number}" for number in range(1, 785)))
DELIMITERS = ",;\t"  # spreadsheets write the second where the comma is the decimal point
VALUES = {str(value) for value in range(256)}
MOST_CHARACTERS = 16_384  # of a line; 785 numbers have a fifth of them
MOST_LINES = sources.MOST_BYTES // 784


def read_directory(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads both files of a directory, each with or without `.gz`.

    Returns:
        The four parts' arrays, named as those of the idx files, and the path each came from, for messages.

    Raises:
        UserError: If a file is missing or malformed; names the file and the line.
    """
    arrays: dict[str, np.ndarray] = {}
    where: dict[str, str] = {}
    for split, name in FILE_NAMES.items():
        path, images, labels = sources.first_good(_find(directory, name), lambda path: (path, *read_file(path)))
        arrays |= {f"{split}-images": images, f"{split}-labels": labels}
        where |= dict.fromkeys((f"{split}-images", f"{split}-labels"), str(path))
    return arrays, where


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads images, uint8 (n, 28, 28), and labels, uint8 (n,), both read-only.

    NumPy reads the file in one fast pass. Only if that fails does a second, slow one look for the line to name.

    Raises:
        UserError: If the file cannot be read, or is not what the header promises.
    """
    try:
        lines = _lines(path)
        delimiter = _delimiter(next(lines, ""))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a file without rows; before NumPy 2.3 also 1.5 for 1
            rows = np.loadtxt(lines, np.uint8, comments=None, delimiter=delimiter or ",", ndmin=2)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except (ValueError, Warning):
        rows = np.zeros((0, 0), np.uint8)
    if delimiter is None or rows.shape[1] != len(COLUMNS) or rows[:, 0].max() > 9:
        raise UserError(f"{path}, {_first_mistake(path)}.")
    images, labels = rows[:, 1:].copy().reshape(-1, 28, 28), rows[:, 0].copy()
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def _find(directory: Path, name: str) -> list[Path]:
    if found := [path for path in (directory / name, directory / f"{name}.gz") if path.is_file()]:
        return found
    raise UserError(
        f"{directory} has no {name} and no {name}.gz; the two files expected there are Kaggle's "
        f"{' and '.join(FILE_NAMES.values())}."
    )


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text with or without a byte order mark, with line ends of any system.

    Raises:
        UserError: If a line, or the text, is longer than any of images.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        number = 0
        while line := file.readline(MOST_CHARACTERS):
            number += 1
            if number > MOST_LINES:
                raise UserError(f"{path} has more than {MOST_LINES:,} lines; no more are read.")
            if len(line) == MOST_CHARACTERS:
                raise UserError(
                    f"{path}, line {number}: expected a label and 784 pixels, found {MOST_CHARACTERS:,} "
                    "characters and no end of the line."
                )
            yield line


def _delimiter(header: str) -> str | None:
    """What separates the cells, by the header; None if it is none."""
    names = header.rstrip("\n").replace('"', "")
    return next((delimiter for delimiter in DELIMITERS if names == delimiter.join(COLUMNS)), None)


def _first_mistake(path: Path) -> str:
    """Says in which line the file is not as expected, and how."""
    lines = _lines(path)
    header = next(lines, "").rstrip("\n")
    delimiter = _delimiter(header)
    if delimiter is None:
        return f"line 1: expected the header label,pixel1,...,pixel784, found {header[:40]!r}"
    for number, line in enumerate(lines, 2):
        cells = line.rstrip("\n").split(delimiter)
        if cells == [""]:
            continue  # NumPy, too, passes over empty lines
        if len(cells) != len(COLUMNS):
            return f"line {number}: expected {len(COLUMNS)} cells, a label and 784 pixels, found {len(cells)}"
        if cells[0] in VALUES and int(cells[0]) <= 9 and VALUES.issuperset(cells):
            continue  # as nearly all lines, told ten times faster than cell by cell
        for column, cell in zip(COLUMNS, cells, strict=True):
            largest = 9 if column == "label" else 255
            if not re.fullmatch(r"\s*0*[0-9]{1,3}\s*", cell) or int(cell) > largest:
                return f"line {number}: {column} is {cell[:40]!r}, expected a whole number from 0 to {largest}"
    return "line 2: expected a row of numbers below the header, found the end of the file"
