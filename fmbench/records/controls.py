"""Records of controls: a reference system's net, trained in its own framework, on our data and splits."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from fmbench import config as config_lib
from fmbench.data import fashion_mnist, splits
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.records.schema import FILE_NAME, Count, Environment, Fraction, Seconds, Strict
from fmbench.system.files import atomic_file

DIRECTORY = "controls"  # of a results directory


class ControlEpoch(Strict):
    """As the framework reports it."""

    train_loss: float
    train_accuracy: Fraction
    val_accuracy: Fraction | None


class ControlStage(Strict):
    """What was predicted at the end of a stage, row `k` of the record's .npy for stage k."""

    num_epochs: Count
    test_accuracy: Fraction
    val_accuracy: Fraction | None


class ControlRecord(Strict):
    """A control's run. `<name>.npy` holds the predicted classes, uint8 (stages, num_test).

    A fold's record has the held-out images' classes in `<name>.validation.npy`, uint8 (stages, num_validation).
    """

    kind: Literal["control"] = "control"
    schema_version: Literal[1] = 1
    created: str  # UTC, ISO 8601
    framework: Literal["keras", "torch"]
    system: str  # with versions
    versions: dict[str, str]
    entry: Annotated[str, Field(pattern=FILE_NAME)]
    config: dict[str, Any]  # the entry's, of which the framework did what it has
    seed: Count
    num_params: Count
    data_version: str
    data_sha256: dict[str, str]
    num_train: Count
    num_validation: Count
    num_test: Count
    wall_seconds: Seconds  # of the process, with its start
    history: list[ControlEpoch]
    stages: list[ControlStage]
    predictions_sha256: str
    val_predictions_sha256: str | None = None  # of a fold
    environment: Environment  # of the machine; the packages named there are fmbench's

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ControlRecord":
        config_lib.check_fields(self.config)
        planned = [stage.num_epochs for stage in self.stages]
        if not planned or sum(planned) != len(self.history):
            raise ValueError(f"history has {len(self.history)} epochs, the stages {planned}")
        return self

    @property
    def name(self) -> str:
        return control_name(self.entry, self.framework, self.seed)

    @property
    def is_fold(self) -> bool:
        return bool(self.config["data"].get("split") == "kfold")


def control_name(entry: str, framework: str, seed: int) -> str:
    """File name without ending: 'cnn3+num_epochs=10-keras-seed0'."""
    return f"{entry}-{framework}-seed{seed}"


def write(record: ControlRecord, test: np.ndarray, validation: np.ndarray | None, results_dir: Path) -> None:
    """Writes a record and its predictions, each atomically, the record last.

    Args:
        record: Of a run that has ended.
        test: uint8 (stages, num_test).
        validation: uint8 (stages, num_validation) of a fold.
        results_dir: They go to <results_dir>/controls.
    """
    folder = results_dir / DIRECTORY
    folder.mkdir(parents=True, exist_ok=True)
    for ending, classes in ((".npy", test), (".validation.npy", validation)):
        if classes is not None:
            with atomic_file(folder / f"{record.name}{ending}") as file:
                np.save(file, classes, allow_pickle=False)
    with atomic_file(folder / f"{record.name}.json") as file:
        file.write(record.model_dump_json(indent=1).encode() + b"\n")


def read_all(results_dir: Path) -> list[ControlRecord]:
    """All of <results_dir>/controls, in the order of their names, their test accuracies proven by the predictions.

    Raises:
        UserError: If one is no valid record or has another's name, or its predictions give other accuracies.
    """
    records = []
    for path in sorted((results_dir / DIRECTORY).glob("*.json")):
        record = store.read_as(ControlRecord, path, "control", "Delete it.")
        if record.name != path.stem:
            raise UserError(f"{path}: its content says {record.name}; a control must keep its name.")
        _prove(record, path)
        records.append(record)
    return records


def _prove(record: ControlRecord, path: Path) -> None:
    dataset = fashion_mnist.load_once("tfds")
    if record.data_sha256 != dataset.sha256:
        raise UserError(f"{path}: made on other data than version {dataset.version}; delete it.")
    test = store.read_classes(
        path.with_suffix(".npy"), (len(record.stages), record.num_test), record.predictions_sha256
    )
    for number, (stage, classes) in enumerate(zip(record.stages, test, strict=True), start=1):
        if stage.test_accuracy != accuracy(classes, dataset.test_labels):
            raise UserError(f"{path}: test_accuracy of stage {number} is not what the predictions give.")
    if record.is_fold:
        shape = (len(record.stages), record.num_validation)
        place = path.with_name(f"{path.stem}.validation.npy")
        held_out = store.read_classes(place, shape, record.val_predictions_sha256)
        _, rows = split(record.config, dataset.train_labels)
        if record.stages[-1].val_accuracy != accuracy(held_out[-1], dataset.train_labels[rows]):
            raise UserError(f"{path}: val_accuracy is not what the predictions give.")


def split(config: dict[str, Any], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Train and validation rows that an entry's config asks for."""
    flat = config_lib.complete(config)
    settings = {name: flat[f"data.{name}"] for name in ("test_size", "random_state", "num_folds", "fold")}
    return splits.split(labels, flat["data.split"], **settings)


def accuracy(classes: np.ndarray, labels: np.ndarray) -> float:
    return float((classes == labels).mean())
