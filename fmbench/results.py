"""What a run leaves behind: a record anyone can doubt and re-check, and the predictions to check it with."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import jax
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fmbench import data_proof, datasets, layers, onednn
from fmbench.config import REPOSITORY
from fmbench.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Status = Literal["completed", "interrupted", "diverged"]
Watched = Literal["validation", "test"]
TARGETS = ("90", "92", "94")  # percent; the keys of time_to_target


class _Strict(BaseModel):
    """No unknown fields, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Environment(_Strict):
    """Where the numbers come from."""

    device_platform: str  # cpu, gpu, tpu
    device_kind: str  # processor or accelerator model
    num_devices: Count
    num_processes: Count
    cpu: str
    cpu_cores: Count
    operating_system: str
    python: str
    versions: dict[str, str]  # package -> version
    xla_flags: str
    git_commit: str | None
    git_dirty: bool | None  # anything changed outside results/


class Epoch(_Strict):
    """One epoch of the history. `train_*` is the mean over the epoch's steps, dropout and all."""

    epoch: Count  # 1 for the first
    step: Count  # steps done at its end
    learning_rate: float
    train_loss: float
    train_accuracy: Fraction
    train_seconds: Seconds  # of this epoch alone
    train_core_seconds: Seconds
    train_images_per_sec: float
    val_loss: float | None = None
    val_accuracy: Fraction | None = None
    test_loss: float | None = None  # only where the config watches the test set
    test_accuracy: Fraction | None = None


class StageResult(_Strict):
    """A stage of the run, and the state at its end."""

    name: str
    num_epochs: Count  # done
    learning_rate: float  # peak
    augment: dict[str, float]  # strengths, as the config has them
    train_seconds: Seconds
    train_core_seconds: Seconds
    val_accuracy: Fraction | None
    test_accuracy: Fraction


class RunRecord(_Strict):
    """A run's record; keys are the field's terms, seconds are wall seconds, fractions lie in [0, 1]."""

    schema_version: Literal[1]
    status: Status
    created: str  # UTC, ISO 8601
    entry: str
    config_file: str
    config: dict[str, Any]
    seed: Count
    dtype: str
    parallel: str
    steps_per_call: Count
    batch_size: Count

    model: str
    num_params: Count  # with the batch norms' running statistics, as Keras counts
    num_trainable_params: Count
    flops_per_image: float  # of a training step

    data_version: str
    data_sha256: dict[str, str]
    num_train: Count
    num_validation: Count
    num_test: Count
    watched: Watched | None  # split evaluated after each epoch

    num_epochs: Count  # done
    num_steps: Count  # done
    num_resumes: Count
    train_loss: float | None
    train_accuracy: Fraction | None
    val_loss: float | None
    val_accuracy: Fraction | None
    test_loss: float | None
    test_accuracy: Fraction | None
    test_top5_accuracy: Fraction | None
    test_per_class_accuracy: list[Fraction] | None
    predictions_sha256: str | None  # of the bytes of the predicted classes, uint8, in idx order

    # From the start of the process, the last one if there were several, to the end of its first step.
    first_step_seconds: Seconds | None = None
    setup_seconds: Seconds  # data, model, restore
    compile_seconds: Seconds
    compile_cached: bool  # programs came from the persistent cache
    train_seconds: Seconds
    eval_seconds: Seconds
    checkpoint_seconds: Seconds
    train_core_seconds: Seconds
    eval_core_seconds: Seconds
    wall_seconds: Seconds  # all of it, over all resumes
    train_images_per_sec: float | None  # steady state: median over epochs
    eval_images_per_sec: float | None
    step_time_ms: float | None  # steady state
    peak_memory_bytes: Count
    time_to_target: dict[str, Seconds | None]  # "94" -> train seconds to 94 % on the watched split

    history: list[Epoch]
    stages: list[StageResult] = []  # those that were finished
    environment: Environment

    @field_validator("time_to_target")
    @classmethod
    def _has_all_targets(cls, seconds: dict[str, Seconds | None]) -> dict[str, Seconds | None]:
        if set(seconds) != set(TARGETS):
            raise ValueError(f"the targets are {', '.join(TARGETS)}")
        return seconds

    @model_validator(mode="after")
    def _completed_means_tested(self) -> "RunRecord":
        if self.status == "completed":
            for field in ("test_accuracy", "test_per_class_accuracy", "predictions_sha256"):
                if getattr(self, field) is None:
                    raise ValueError(f"{field} is missing from a completed run")
        return self

    @model_validator(mode="after")
    def _agrees_with_its_config(self) -> "RunRecord":
        for field in ("entry", "config_file", "seed", "dtype", "parallel", "batch_size"):
            if self.config.get(field) != getattr(self, field):
                raise ValueError(f"{field} is {getattr(self, field)}, but config.{field} {self.config.get(field)}")
        if self.num_epochs > self.config.get("num_epochs", 0):
            raise ValueError(f"num_epochs is {self.num_epochs}, more than config.num_epochs")
        return self

    @property
    def name(self) -> str:
        """File name without ending; a run on the old data never takes the name of one on the standard data."""
        name = record_name(self.entry, self.environment, self.dtype, self.seed)
        return f"{name}-old" if self.data_version == data_proof.OLD else name


def record_name(entry: str, environment: Environment, dtype: str, seed: int) -> str:
    """<entry>-<device>-<dtype>-seed<k>, with the number of devices if there are several."""
    device = environment.device_platform
    if device != "cpu":
        device = re.sub(r"[^a-z0-9]+", "-", environment.device_kind.lower()).strip("-")
    if environment.num_devices > 1:
        device += f"-x{environment.num_devices}"
    return f"{entry}-{device}-{dtype}-seed{seed}"


def environment() -> Environment:
    """Describes this process's machine, libraries and commit."""
    device = jax.devices()[0]
    packages = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets"]
    if layers.convolves_in_onednn():
        packages.append(onednn.PACKAGE)
    commit, dirty = _git()
    return Environment(
        device_platform=device.platform,
        device_kind=_cpu_model() if device.platform == "cpu" else device.device_kind,
        num_devices=jax.device_count(),
        num_processes=jax.process_count(),
        cpu=_cpu_model(),
        cpu_cores=_cpu_cores(),
        operating_system=platform.platform(),
        python=platform.python_version(),
        versions={package: importlib.metadata.version(package) for package in packages},
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        git_commit=commit,
        git_dirty=dirty,
    )


def now() -> str:
    """The time for `created`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def peak_memory_bytes() -> int:
    """The most memory held at any time: the accelerator's, or on CPUs the process's."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    if statistics[0] and "peak_bytes_in_use" in statistics[0]:
        return max(device["peak_bytes_in_use"] for device in statistics)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is inherited from the parent, which may have been larger
        (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(kilobytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def predictions_sha256(predictions: np.ndarray) -> str:
    """The hash that ties a record to its predictions, (n,) uint8."""
    return hashlib.sha256(predictions.astype(np.uint8).tobytes()).hexdigest()


def check_writable(results_dir: Path) -> None:
    """Looks before a run whether its record will find a place.

    Raises:
        UserError: If the directory is a file, or cannot be made or written to.
    """
    nearest = next(path for path in (results_dir / "runs", *(results_dir / "runs").parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--results_dir={results_dir} cannot be written to ({nearest}); name another one.")


def write(record: RunRecord, predictions: np.ndarray | None, stem: Path) -> None:
    """Writes <stem>.json and, if there are predictions, <stem>.npy, each atomically.

    Raises:
        UserError: If they cannot be written there.
    """
    RunRecord.model_validate(record.model_dump())
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        if predictions is not None:
            with atomic_file(stem.with_name(stem.name + ".npy")) as file:
                np.save(file, predictions.astype(np.uint8), allow_pickle=False)
        with atomic_file(stem.with_name(stem.name + ".json")) as file:
            file.write(record.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{stem}.json: cannot write the record ({error.strerror}).") from error


def publish(stem: Path, results_dir: Path) -> RunRecord:
    """Copies the record <stem>.json and its predictions to <results_dir>/runs, under the record's name.

    The record of a run that was not completed replaces none that was. Next to the first record on an old data
    set go its true test labels, to <results_dir>/labels: others cannot fetch them.
    """
    record = read(stem.with_name(stem.name + ".json"))
    target = results_dir / "runs" / f"{record.name}.json"
    predictions = None
    if record.status == "completed":
        predictions = read_predictions(record, stem.with_name(stem.name + ".npy"))
        if record.data_version == data_proof.OLD:
            _publish_labels(record, results_dir)
    elif target.exists() and read(target).status == "completed":
        return record
    write(record, predictions, target.with_name(record.name))
    return record


def read(path: Path) -> RunRecord:
    """Reads and validates a record.

    Raises:
        UserError: If the file cannot be read or is no valid record; names the file and the field.
    """
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read the record ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            f"{path}: not a valid record, field '{field}': {first['msg']}. Delete it and run the entry again."
        ) from error


def read_predictions(record: RunRecord, path: Path) -> np.ndarray:
    """Reads a record's predicted classes, uint8 (num_test,), and proves that they are the record's.

    Raises:
        UserError: If the file is missing, broken or another run's.
    """
    predictions = _read_array(path, "the predictions")
    is_array_of_classes = predictions.dtype == np.uint8 and predictions.shape == (record.num_test,)
    if not is_array_of_classes or predictions_sha256(predictions) != record.predictions_sha256:
        raise UserError(f"{path}: not the predictions of {path.stem}.json; run the entry again.")
    return predictions


def read_labels(record: RunRecord, results_dir: Path) -> np.ndarray:
    """Reads the true test labels that were published with a record on the old data, uint8 (num_test,).

    Raises:
        UserError: If the file is missing, broken or not the labels whose hash the record has.
    """
    path = _labels_path(record, results_dir)
    labels = _read_array(path, "the true labels")
    if labels.shape != (record.num_test,) or data_proof.sha256(labels) != record.data_sha256["t10k-labels"]:
        raise UserError(f"{path}: not the labels its name says; delete it and run {record.entry} again.")
    return labels


def _publish_labels(record: RunRecord, results_dir: Path) -> None:
    path = _labels_path(record, results_dir)
    if path.exists():
        return
    dataset = datasets.load(record.config["data"]["source"], record.config["data"]["dir"])
    if dataset.sha256 != record.data_sha256:
        raise UserError(f"{record.config['data']['dir']} no longer holds the data of {record.name}; run it again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.save(file, dataset.test_labels, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot write the true labels ({error.strerror}).") from error


def _labels_path(record: RunRecord, results_dir: Path) -> Path:
    return results_dir / "labels" / f"{record.data_sha256['t10k-labels']}.npy"


def _read_array(path: Path, what: str) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for a damaged file
        raise UserError(f"{path}: cannot read {what} ({error}).") from error


def read_all(results_dir: Path) -> dict[Path, RunRecord]:
    """All records of <results_dir>/runs by path, in the order of their names.

    Raises:
        UserError: As `read`, or if a record's name is not what its content says.
    """
    records = {}
    for path in sorted((results_dir / "runs").glob("*.json")):
        records[path] = read(path)
        if path.stem != records[path].name:
            raise UserError(f"{path}: its content says {records[path].name}; a record must keep its name.")
    return records


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


def _cpu_model() -> str:
    """The processor as its maker calls it, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_cores() -> int:
    """Cores this process may use; macOS only tells how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git() -> tuple[str | None, bool | None]:
    """Commit of this checkout and whether anything but results/ differs from it; None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(REPOSITORY), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    if git("rev-parse", "--show-toplevel") != str(REPOSITORY):
        return None, None  # installed elsewhere, perhaps below someone else's repository
    changes = git("status", "--porcelain", "--", ".", ":!results", ":!README.md")
    return git("rev-parse", "HEAD"), None if changes is None else bool(changes)
