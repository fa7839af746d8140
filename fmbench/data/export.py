"""Writes Fashion-MNIST in formats that other programs read.

`csv` and `idx` come back through `datasets.load` with the same hashes.
"""

import argparse
import contextlib
import csv
import fcntl
import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fmbench.data import kaggle_csv, sources
from fmbench.data.fashion_mnist import PARTS, Dataset
from fmbench.errors import UserError

FORMATS = """\
--format=csv  Kaggle's fashion-mnist_train.csv and fashion-mnist_test.csv
--format=idx  the four files as they are published, gzipped
--format=png  train/ and test/ with a folder per class: 70,000 files like train/9-Ankle-boot/00000.png,
              numbered as in the idx files
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `export` to the commands of `fmbench.datasets`."""
    parser = commands.add_parser(
        "export",
        help="write it as CSV, idx or PNG files",
        description="Prepares Fashion-MNIST if need be, proves it and writes it for other programs.",
        epilog=FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", choices=["csv", "idx", "png"], required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    # Without a default of its own, which would replace what was given before the command.
    parser.add_argument("--data_dir", default=argparse.SUPPRESS, help="as without a command")


def export(dataset: Dataset, format: str, directory: Path) -> None:
    """Writes both splits of the data to `directory`, where they appear when all is written.

    Args:
        dataset: Of any version.
        format: 'csv', 'idx' or 'png'.
        directory: Made if absent.

    Raises:
        UserError: If `directory` holds anything, or cannot be written to.
    """
    write = {"csv": _write_csv, "idx": _write_idx, "png": _write_png}[format]
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True)
        with _alone(directory), tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as unfinished:
            write(dataset, Path(unfinished))
            for path in Path(unfinished).iterdir():
                path.rename(directory / path.name)
    except FileExistsError as error:
        raise UserError(_not_empty(directory)) from error
    except OSError as error:
        raise UserError(f"--output={directory} cannot be written to: {error.strerror or error}.") from error
    print(f"Fashion-MNIST {dataset.version} is in {directory}")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps other exports out, and removes what killed ones left.

    Raises:
        UserError: If there is more in the directory.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output={directory} is being written to by another export; wait for it.") from error
        left = list(directory.iterdir())
        if not all(path.name.startswith(".unfinished-") and path.is_dir() for path in left):
            raise UserError(_not_empty(directory))
        for path in left:
            shutil.rmtree(path)
        yield
    finally:
        os.close(descriptor)


def _not_empty(directory: Path) -> str:
    return f"--output={directory} is not an empty directory; name one that is, or a new one."


def _write_csv(dataset: Dataset, directory: Path) -> None:
    for split, images, labels in _splits(dataset):
        name = kaggle_csv.FILE_NAMES["train" if split == "train" else "t10k"]
        rows = np.column_stack([labels, images.reshape(len(images), -1)])
        with (directory / name).open("w", encoding="ascii", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(kaggle_csv.COLUMNS)
            writer.writerows(row.tolist() for row in tqdm(rows, f"Writing {name}", disable=None))


def _write_idx(dataset: Dataset, directory: Path) -> None:
    for field, part in tqdm(PARTS.items(), "Writing idx files", disable=None):
        array = getattr(dataset, field)
        # Neither time nor name in the gzip header: the same data make the same file.
        with (
            (directory / f"{sources.FILE_NAMES[part]}.gz").open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
        ):
            file.write(sources.idx_header(array))
            file.write(array.tobytes())


def _write_png(dataset: Dataset, directory: Path) -> None:
    import PIL.Image

    for split, images, labels in _splits(dataset):
        folders = [
            directory / split / f"{label}-{_file_safe(name)}" for label, name in enumerate(dataset.class_names)
        ]
        for folder in folders:
            folder.mkdir(parents=True)
        for row, image in enumerate(tqdm(images, f"Writing {split}", disable=None)):
            PIL.Image.fromarray(image).save(folders[labels[row]] / f"{row:05}.png")


def _splits(dataset: Dataset) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return [
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ]


def _file_safe(name: str) -> str:
    """'T-shirt/top' -> 'T-shirt-top'."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name)
