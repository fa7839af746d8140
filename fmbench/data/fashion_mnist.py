"""Fashion-MNIST as proven arrays.

The images come out of TensorFlow Datasets, without TensorFlow: a TFDS directory is prepared once
from the four official idx files, read once, and kept as memory-mapped arrays in a cache. Whichever
way the arrays came, they stand in the order of the idx files, and none is returned before its
SHA-256 is proven to be that of the official file: to train on MNIST digits or, unless it was asked
for by name, on the withdrawn first version of Fashion-MNIST is an error, not a surprising accuracy.
"""

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from fmbench.data import kaggle_csv, sources, tfds_directory
from fmbench.data.proof import HOME_PAGE, OTHER_DATA, SHA256, STANDARD, is_unproven, prove, recognize
from fmbench.errors import UserError
from fmbench.system.files import atomic_file, cache_directory
from fmbench.system.places import local_path

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

SAMPLE_DIRECTORY = Path(__file__).parent / "sample"
Arrays = dict[str, np.ndarray]  # one per part: train-images, train-labels, t10k-images, t10k-labels
PARTS = {
    "train_images": "train-images",
    "train_labels": "train-labels",
    "test_images": "t10k-images",
    "test_labels": "t10k-labels",
}


@dataclass(frozen=True)
class Dataset:
    """Read-only arrays in the order of the idx files, from the cache memory-mapped.

    Attributes:
      train_images: uint8 (n, 28, 28).
      train_labels: uint8 (n,), an index into `class_names`.
      test_images: uint8 (m, 28, 28).
      test_labels: uint8 (m,).
      version: a key of `SHA256`; or 'old' or 'unproven-...', which cannot be proven (see `proof`).
      sha256: the hash of each of the four parts.
      class_names: ten.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    version: str
    sha256: dict[str, str]
    class_names: tuple[str, ...] = CLASS_NAMES


def load(
    source: str = "tfds", data_dir: str | None = None, unproven: bool = False, mapped: bool = False
) -> Dataset:
    """Loads Fashion-MNIST, preparing it when this is the first time.

    Args:
      source: 'tfds', the real data through TensorFlow Datasets; 'csv' or 'idx', whichever version
        Kaggle's two CSV files or the four idx files in `data_dir` hold, be it the old one; or
        'sample', the 480 + 200 images in the repository's tests.
      data_dir: for 'tfds' a directory with the four idx files, gzipped or not, or a TFDS data
        directory; None or empty means `$FMBENCH_DATA_DIR`. A directory named in either way is
        always read and proven. If none is named, the data comes from the cache, else from a TFDS
        directory already prepared, else from `sources.sources`.
      unproven: for 'csv' and 'idx', whether other data of the same shape will do. Their classes are
        called as the ten lines of `class_names.txt` in `data_dir` say, or else '0' to '9'.
      mapped: for 'idx', whether images stay in their files where these are not gzipped. Then they may be more than
        memory holds.

    Raises:
      UserError: unknown source; data that is missing, damaged or of another set; unwritable cache.
    """
    if unproven and source not in ("csv", "idx"):
        raise UserError(
            f"config.data.unproven is for data that you name; give --config.data.source=idx, not {source}, and "
            "--config.data.dir=DIR."
        )
    if source == "tfds":
        named = data_dir or os.environ.get("FMBENCH_DATA_DIR")
        directory = local_path(named) if named else None
        return _dataset(_load_cached(STANDARD, directory), STANDARD, SHA256[STANDARD])
    if source == "sample":
        if data_dir:
            raise UserError(f"The sample comes with the repository; drop data_dir={data_dir!r}.")
        return _dataset(_read_idx_directory(SAMPLE_DIRECTORY, "sample"), "sample", SHA256["sample"])
    if source not in ("csv", "idx"):
        raise UserError(f"Unknown data source {source!r}. The sources are 'tfds', 'csv', 'idx' and 'sample'.")
    if not data_dir:
        raise UserError(f"Data source {source!r} reads what you name: give --config.data.dir=DIR.")
    directory = local_path(data_dir)
    if source == "csv":
        arrays, where = kaggle_csv.read_directory(directory)
    else:
        arrays, where = sources.decode_directory(directory, mapped=mapped)
    version, sha256 = recognize(arrays, where, unproven=unproven)
    return _dataset(arrays, version, sha256, _class_names(directory) if is_unproven(version) else CLASS_NAMES)


@functools.cache
def load_once(source: str) -> Dataset:
    """As `load`, which reads and proves anew at each call, but once a process: for what asks for every record."""
    return load(source)


def of_config(data: Mapping[str, Any], data_dir: str | None = None) -> Dataset:
    """As `load`, by the fields of `config.data`, of older records too; `data_dir` comes before theirs."""
    return load(
        data.get("source", "tfds"),
        data_dir or data.get("dir"),
        data.get("unproven", False),
        data.get("pipeline") == "grain",
    )


def _dataset(
    arrays: Arrays, version: str, sha256: dict[str, str], class_names: tuple[str, ...] = CLASS_NAMES
) -> Dataset:
    fields = {field: arrays[part] for field, part in PARTS.items()}
    return Dataset(**fields, version=version, sha256=dict(sha256), class_names=class_names)


def _class_names(directory: Path) -> tuple[str, ...]:
    path = directory / "class_names.txt"
    if not path.is_file():
        return tuple(map(str, range(10)))
    try:
        with path.open(encoding="utf-8-sig") as file:
            names = tuple(line.strip() for line in file.read(10_000).splitlines())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if len(names) != 10 or len({*names, ""}) != 11 or not "".join(names).isprintable():
        raise UserError(f"{path} must have ten lines, a different name for each class, from class 0 on.")
    return names


def _read_idx_directory(directory: Path, version: str) -> Arrays:
    return _decode_idx_files(sources.read_directory(directory), version, OTHER_DATA)


def _decode_idx_files(files: sources.Files, version: str, remedy: str = "") -> Arrays:
    def proven(part: str, file: sources.IdxFile) -> np.ndarray:
        array = sources.decode_idx(file)
        prove(part, array, version, file.where, remedy)
        return array

    return {part: sources.first_good(found, functools.partial(proven, part)) for part, found in files.items()}


def _load_cached(version: str, directory: Path | None) -> Arrays:
    """Reads the proven arrays of `version` from the cache, filling it first where needed.

    What the user named as `directory` is read and proven even if the cache could do without.
    """
    named = None if directory is None else _read_named(directory, version)
    cache = cache_directory() / version
    with contextlib.suppress(FileNotFoundError, UserError):  # told below, under the lock
        return _read_cache(cache, version)
    try:
        with _lock(cache):
            try:
                return _read_cache(cache, version)  # another process may have filled it meanwhile
            except FileNotFoundError:
                pass
            except UserError as damage:
                logging.warning("The cache is damaged and will be rebuilt. %s", damage)
            _sweep(cache)
            if directory is not None and named is not None and tfds_directory.is_prepared(directory):
                arrays = named
                _note_origin(cache, f"the TFDS directory {directory}")
            else:
                arrays = _pass_through_tfds(named, f"{directory}", version, cache)
            _write_cache(arrays, cache, version)
    except OSError as error:
        raise UserError(
            f"The cache {cache} cannot be written: {error}. Set FMBENCH_CACHE to a directory you "
            "may write to, with 0.3 GB free."
        ) from error
    return _read_cache(cache, version)


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Lets one process at a time fill the cache; the system frees the lock of one that dies."""
    from filelock import FileLock, Timeout

    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / "lock")
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        _say("Another process is preparing Fashion-MNIST; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _cache_path(cache: Path, part: str, version: str) -> Path:
    return cache / f"{part}-{SHA256[version][part]}.npy"


def _read_cache(cache: Path, version: str) -> Arrays:
    """Maps and proves the cached arrays.

    Raises:
      FileNotFoundError: a part is not in the cache.
      UserError: a part is damaged.
    """
    arrays = {}
    for part in SHA256[version]:
        path = _cache_path(cache, part, version)
        try:
            arrays[part] = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged header makes np.load fail in many ways
            raise UserError(f"{path} cannot be read: {error}") from error
        prove(part, arrays[part], version, str(path))
    return arrays


def _write_cache(arrays: Arrays, cache: Path, version: str) -> None:
    for part, array in arrays.items():
        with atomic_file(_cache_path(cache, part, version)) as file:
            np.save(file, array)


def _note_origin(cache: Path, origin: str) -> None:
    with atomic_file(cache / "origin.txt") as file:
        file.write(f"{origin}\n".encode(errors="replace"))


def origin(cache: Path) -> str:
    """What the cache was made from, in words."""
    try:
        return (cache / "origin.txt").read_text(encoding="utf-8").strip() or "what is not noted"
    except (OSError, ValueError):
        return "what is not noted"


def _sweep(cache: Path) -> None:
    """Removes what killed processes left unfinished; to be called under the lock."""
    for path in cache.glob(".unfinished-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in cache.glob("*.unfinished"):  # of earlier versions of fmbench
        path.unlink(missing_ok=True)
    if not tfds_directory.is_prepared(cache / "tfds"):
        shutil.rmtree(cache / "tfds", ignore_errors=True)


# The way there: idx files, a TFDS directory, arrays.


def _pass_through_tfds(idx: Arrays | None, where: str, version: str, cache: Path) -> Arrays:
    """Reads a prepared TFDS directory, preparing one from idx files where there is none.

    Args:
      idx: the proven arrays of the idx files the user named; None to look for idx files if need be.
      where: `idx` comes from.
      version: a key of `SHA256`.
      cache: the cache directory of this version; its `tfds` is ours to prepare and to replace.
    """
    ours, default = cache / "tfds", tfds_directory.default_directory()
    for directory in (ours, default):
        if tfds_directory.is_prepared(directory):
            try:
                arrays = _read_tfds(directory, version)
            except UserError as error:
                logging.warning("Passing over a TFDS directory. %s", error)
                continue
            if directory == default or not (cache / "origin.txt").exists():
                _note_origin(cache, f"the TFDS directory {directory}")
            return arrays
    if idx is None:
        idx, where = _find_idx_files(version, cache)
    _say(f"Preparing Fashion-MNIST with TFDS in {ours}: once, some 20 seconds.")
    shutil.rmtree(ours, ignore_errors=True)
    _note_origin(cache, where)  # first: who is killed between the two finds no TFDS directory, and begins again
    tfds_directory.prepare(idx, ours)
    return _read_tfds(ours, version)


def _find_idx_files(version: str, scratch: Path) -> tuple[Arrays, str]:
    """Returns the proven arrays of the first source that has them, and the name of that source."""
    tried = []
    for name, fetch in sources.sources(scratch).items():
        try:
            return _decode_idx_files(fetch(), version), name
        except UserError as error:
            tried.append(f"\n  {name}: {error}")
    raise UserError(
        f"Fashion-MNIST was found nowhere. Tried:{''.join(tried)}\n"
        "Put its four files (train-images-idx3-ubyte.gz, ...; gzipped or not) into a directory and "
        f"name it in FMBENCH_DATA_DIR. They are at {HOME_PAGE} and in Debian's package "
        f"{sources.DEBIAN_PACKAGE}."
    )


def _read_tfds(directory: Path, version: str) -> Arrays:
    _say(f"Reading the TFDS directory {directory}: some 10 seconds.")
    try:
        arrays = tfds_directory.read(directory)
    except Exception as error:  # TFDS has no kind of its own for what it cannot read
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The TFDS directory {directory} cannot be read: {type(error).__name__}: {reason} It "
            "must be prepared with file_format='array_record'; or name a directory with idx files."
        ) from error
    for part, array in arrays.items():
        prove(part, array, version, f"The TFDS directory {directory}")
    return arrays


def _read_named(directory: Path, version: str) -> Arrays:
    if tfds_directory.is_prepared(directory):
        return _read_tfds(directory, version)
    return _read_idx_directory(directory, version)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
