"""Records on disk: written and published, read and proven."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import filelock
import numpy as np
from pydantic import BaseModel, ValidationError

from fmbench.data import fashion_mnist, proof
from fmbench.errors import UserError
from fmbench.records.schema import RunRecord, predictions_sha256
from fmbench.system.files import atomic_file

# Bytes. The largest committed record has 43,000, and predictions have one for each test image.
LARGEST_RECORD = 64 << 20
LARGEST_ARRAY = 64 << 20
LONGEST_WAIT = 300  # seconds, for others that publish
LONGEST_TEXT = 300  # characters of a file that a message repeats

Model = TypeVar("Model", bound=BaseModel)


def check_writable(results_dir: Path) -> None:
    """Looks before a run whether its record will find a place.

    Raises:
        UserError: If the directory is a file, or cannot be made or written to.
    """
    nearest = next(path for path in (results_dir / "runs", *(results_dir / "runs").parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--results_dir={results_dir} cannot be written to ({nearest}); name another one.")


def write(
    record: RunRecord, predictions: np.ndarray | None, stem: Path, val_predictions: np.ndarray | None = None
) -> None:
    """Writes <stem>.json, <stem>.npy and <stem>.validation.npy, as far as there are predictions, each atomically.

    Raises:
        UserError: If they cannot be written there.
    """
    RunRecord.model_validate(record.model_dump())
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for ending, classes in ((".npy", predictions), (".validation.npy", val_predictions)):
            if classes is not None:
                with atomic_file(stem.with_name(stem.name + ending)) as file:
                    np.save(file, classes.astype(np.uint8), allow_pickle=False)
        with atomic_file(stem.with_name(stem.name + ".json")) as file:
            file.write(record.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{error.filename or stem}: cannot write the record ({error.strerror}).") from error


def publish(stem: Path, results_dir: Path, *, data_dir: str | None = None) -> RunRecord:
    """Copies the record <stem>.json and its predictions to <results_dir>/runs, under the record's name.

    The record of a run that was not completed replaces none that was. Of two processes that publish at a time, on
    whatever machines, one waits, so that a record and its predictions are always of one run. Next to the first
    record on an old or another data set go its true test labels, to <results_dir>/labels, for others cannot fetch
    them.

    Args:
        stem: In the work directory.
        results_dir: Where the records are collected.
        data_dir: Where the run's data lie now, if they were moved.

    Raises:
        UserError: If there is no valid record, or it cannot be written there.
    """
    record = read(stem.with_name(stem.name + ".json"))
    target = results_dir / "runs" / f"{record.name}.json"
    is_completed = record.status == "completed"
    predictions = val_predictions = labels = None
    if is_completed:
        predictions = read_predictions(record, stem.with_name(stem.name + ".npy"))
        if record.val_predictions_sha256:
            val_predictions = read_val_predictions(record, stem.with_name(stem.name + ".validation.npy"))
        if has_own_labels(record) and not _labels_path(record, results_dir).exists():
            labels = _own_labels(record, data_dir)
    with _only_one(results_dir / "runs"):
        if is_completed or not target.exists() or read(target).status != "completed":
            if labels is not None:
                _write_labels(labels, _labels_path(record, results_dir))
            write(record, predictions, target.with_name(record.name), val_predictions)
    return record


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keeps others that publish to this folder waiting."""
    lock = filelock.FileLock(folder / ".lock", timeout=LONGEST_WAIT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"{folder}/.lock: another process has held it for {LONGEST_WAIT} s; end that one, and give the same "
            "command again."
        ) from error
    except OSError as error:
        raise UserError(f"{folder}: cannot write the record ({error.strerror}).") from error
    try:
        yield
    finally:
        lock.release()


def read(path: Path) -> RunRecord:
    """Reads and validates a record.

    Raises:
        UserError: If the file cannot be read or is no valid record; names the file and the field.
    """
    return read_as(RunRecord, path, "record", "Delete it and run the entry again.")


def read_as(model: type[Model], path: Path, what: str, remedy: str) -> Model:
    """Reads what stands beside the records, as `read` does; `what` it is, and what to do where it is not valid."""
    try:
        return model.model_validate_json(_read_bytes(path, LARGEST_RECORD))
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what} ({error.strerror or error}).") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            f"{path}: not a valid {what}, field '{_in_one_line(field)}': {_in_one_line(first['msg'])}. {remedy}"
        ) from error


def _read_bytes(path: Path, largest: int) -> bytes:
    """The content of a plain file; a link may lead anywhere, and a pipe or device may never end.

    Raises:
        OSError: If it is anything else, is larger, or cannot be read.
    """
    if path.is_symlink():
        raise OSError("it is a link; put the file itself in its place")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no plain file; remove it")
        if status.st_size > largest:
            raise OSError(f"it has {status.st_size:,} bytes, and {largest:,} at most are read")
        return file.read(largest)


def _in_one_line(text: str) -> str:
    """What a file says, for a message: short, and without line ends or what moves a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text[:LONGEST_TEXT])


def read_predictions(record: RunRecord, path: Path) -> np.ndarray:
    """Reads a record's predicted classes, uint8 (num_test,), and proves that they are the record's.

    Raises:
        UserError: If the file is missing, broken or another run's.
    """
    return read_classes(path, (record.num_test,), record.predictions_sha256)


def read_val_predictions(record: RunRecord, path: Path) -> np.ndarray:
    """As `read_predictions`, of a fold's held-out images: uint8 (num_validation,)."""
    return read_classes(path, (record.num_validation,), record.val_predictions_sha256)


def read_classes(path: Path, shape: tuple[int, ...], sha256: str | None) -> np.ndarray:
    """Reads predicted classes, uint8 of this shape, with this hash; raises as `read_predictions`."""
    predictions = _read_array(path, "the predictions")
    is_array_of_classes = predictions.dtype == np.uint8 and predictions.shape == shape
    if not is_array_of_classes or predictions_sha256(predictions) != sha256:
        name = path.name.removesuffix(".npy").removesuffix(".validation")
        raise UserError(f"{path}: not the predictions of {name}.json; run the entry again.")
    return predictions


def has_own_labels(record: RunRecord) -> bool:
    """Whether a record's true labels are published with it: those of the old data and of other data."""
    return record.data_version == proof.OLD or proof.is_unproven(record.data_version)


def read_labels(record: RunRecord, results_dir: Path) -> np.ndarray:
    """Reads the true test labels that were published with a record, uint8 (num_test,).

    Raises:
        UserError: If the file is missing, broken or not the labels whose hash the record has.
    """
    path = _labels_path(record, results_dir)
    labels = _read_array(path, "the true labels")
    if labels.shape != (record.num_test,) or proof.sha256(labels) != record.data_sha256["t10k-labels"]:
        raise UserError(f"{path}: not the labels its name says; delete it and run {record.entry} again.")
    return labels


def _own_labels(record: RunRecord, data_dir: str | None) -> np.ndarray:
    """The true test labels of a record's data, which others cannot fetch."""
    dataset = _load_data(record, data_dir)
    if dataset.sha256 != record.data_sha256:
        raise UserError(
            f"{data_dir or record.config['data'].get('dir')} no longer holds the data of {record.name}; "
            "run it again."
        )
    return dataset.test_labels


def _write_labels(labels: np.ndarray, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.save(file, labels, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot write the true labels ({error.strerror}).") from error


def _load_data(record: RunRecord, data_dir: str | None = None) -> fashion_mnist.Dataset:
    data = record.config["data"]
    return fashion_mnist.of_config(data, data_dir)


def _labels_path(record: RunRecord, results_dir: Path) -> Path:
    return results_dir / "labels" / f"{record.data_sha256['t10k-labels']}.npy"


def _read_array(path: Path, what: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(_read_bytes(path, LARGEST_ARRAY)), allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for a damaged file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot read {what} ({_in_one_line(str(reason))}).") from error


def read_all(results_dir: Path) -> dict[Path, RunRecord]:
    """All records of <results_dir>/runs by path, in the order of their names.

    Raises:
        UserError: As `read`, or if a record's name is not what its content says.
    """
    records = {}
    for path in sorted((results_dir / "runs").glob("*.json")):
        records[path] = read(path)
        if path.stem != records[path].name:
            remedy = "a record must keep its name"
            if records[path].schema_version == 1:
                remedy += ", which results/to_schema_2.py gives to one from before names told machines apart"
            raise UserError(f"{path}: its content says {records[path].name}; {remedy}.")
    return records


def read_run(workdir: Path) -> tuple[RunRecord, fashion_mnist.Dataset]:
    """The record of a completed run and the data it was made on.

    Raises:
        UserError: If there is no completed run, or other data.
    """
    if not (workdir / "record.json").exists():
        raise UserError(f"{workdir} holds no record; name the work directory of a completed run.")
    record = read(workdir / "record.json")
    if record.status != "completed":
        raise UserError(f"{workdir} holds a run that is {record.status}; complete it first.")
    dataset = _load_data(record)
    if dataset.sha256 != record.data_sha256:
        raise UserError(f"{workdir} holds a run on data of version {record.data_version}, not {dataset.version}.")
    return record, dataset
