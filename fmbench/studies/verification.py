"""Verification: a record's run trained once more, and what differs."""

import datetime
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench.data import proof
from fmbench.errors import UserError
from fmbench.records import machine, store
from fmbench.records.schema import Environment, RunRecord
from fmbench.records.verified import Verification
from fmbench.studies import memory
from fmbench.training.run import train_and_evaluate

# How far the first epochs' train losses of one recipe and seed may lie apart, as a fraction, if code, machine or
# libraries are not the same; docs/measuring.md has what was seen.
FIRST_EPOCH = 0.03
WHOLE_RUN = (
    0.015  # likewise of the test accuracies of whole runs, which two seeds of one recipe have up to 0.008 apart
)
CHEAP_SECONDS = 15  # of training an epoch, by the record


class Comparison(NamedTuple):
    """A record and its run trained again."""

    num_epochs: int  # compared
    distances: list[float]  # of the train losses, epoch by epoch, as fractions of the record's
    differing: int | None  # test images that are classified otherwise; None, if only a part was trained
    accuracy_distance: float | None  # of the test accuracies; likewise

    @property
    def is_equal(self) -> bool:
        """Whether the losses, and the predictions if there are, are the record's to the last bit."""
        return not any(self.distances) and not self.differing

    @property
    def is_within(self) -> bool:
        """Whether the first epoch's loss, and a whole run's accuracy, is near enough; what is between drifts."""
        return self.distances[0] <= FIRST_EPOCH and (self.accuracy_distance or 0) <= WHOLE_RUN


def config_of(record: RunRecord) -> config_dict.ConfigDict:
    """The record's config as it was run, with the defaults of fields that came later, and the data as found here.

    Raises:
        UserError: If a field has a value that no run can use any more.
    """
    config = config_lib.base_config()
    kinds = config_lib.flatten(config.to_dict())
    flat = config_lib.complete(record.config)
    if record.data_version == proof.STANDARD:
        flat |= {"data.source": "tfds", "data.dir": None, "data.unproven": False}
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = tuple(value) if isinstance(kinds.get(key), tuple) else value
    with config.unlocked():
        config.update(nested)
    config_lib.check(config)
    config.lock()
    return config


def differences(there: Environment, here: Environment) -> list[str]:
    """What is not the same here as where a record was made, as far as its numbers may depend on it."""
    fields = ("git_commit", "git_dirty", "device_kind", "num_devices", "cpu_cores", "python", "xla_flags")
    pairs = {field: (getattr(there, field), getattr(here, field)) for field in fields}
    # In records from before they were asked for, nothing is known of them.
    settings = {} if there.thread_settings is None else (there.thread_settings | (here.thread_settings or {}))
    for name in settings:
        pairs[name] = ((there.thread_settings or {}).get(name), (here.thread_settings or {}).get(name))
    packages = sorted(there.versions.keys() | here.versions.keys())
    pairs |= {package: (there.versions.get(package), here.versions.get(package)) for package in packages}
    return [f"{name}: {old} there, {new} here" for name, (old, new) in pairs.items() if old != new]


def retrain(record: RunRecord, predictions: Any, num_epochs: int) -> Comparison:
    """Trains a record's run again, the whole or its first epochs, in a folder that is thrown away.

    Args:
        record: Of a completed run.
        predictions: The record's, uint8 (num_test,).
        num_epochs: At most the record's.

    Raises:
        UserError: If it cannot be trained here.
        KeyboardInterrupt: If the run was stopped.
    """
    config = config_of(record)
    with tempfile.TemporaryDirectory() as folder, memory.explained(config):
        results_dir = Path(folder) / "results"
        stop_after = num_epochs if num_epochs < record.num_epochs else 0
        again = train_and_evaluate(config, Path(folder) / "work", results_dir=results_dir, stop_after=stop_after)
        if len(again.history) < num_epochs:
            if again.status == "interrupted":
                raise KeyboardInterrupt
            raise UserError(f"{record.name}: {again.status} after {again.num_epochs} of {num_epochs} epochs here.")
        differing = accuracy_distance = None
        if again.status == "completed":
            found = store.read_predictions(again, results_dir / "runs" / f"{again.name}.npy")
            differing = int((found != predictions).sum())
            accuracy_distance = abs((again.test_accuracy or 0) - (record.test_accuracy or 0))
    pairs = itertools.islice(zip(record.history, again.history, strict=False), num_epochs)
    distances = [abs(new.train_loss - old.train_loss) / abs(old.train_loss) for old, new in pairs]
    return Comparison(num_epochs, distances, differing, accuracy_distance)


def cheap(records: Mapping[Path, RunRecord], day: datetime.date) -> Path:
    """One record of that day, of those on the standard data with an epoch of a few seconds.

    Raises:
        UserError: If there is none.
    """
    candidates = [
        path
        for path, record in sorted(records.items())
        if record.status == "completed"
        and record.data_version == proof.STANDARD
        and record.environment.device_platform == "cpu"
        and record.dtype == "float32"  # which every processor has
        and not record.config.get("features", {}).get("backbone")
        and record.train_seconds * record.environment.cpu_cores / record.num_epochs <= 2 * CHEAP_SECONDS
    ]
    if not candidates:
        raise UserError("there is no record with an epoch of a few seconds; name one.")
    return candidates[day.toordinal() % len(candidates)]


def outcome(record: RunRecord, comparison: Comparison, differing: Sequence[str]) -> Verification:
    """What is left beside the records of it."""
    return Verification(
        record=record.name,
        predictions_sha256=record.predictions_sha256 or "",
        created=machine.now(),
        num_epochs=comparison.num_epochs,
        train_loss_distances=comparison.distances,
        predictions_that_differ=comparison.differing,
        test_accuracy_distance=comparison.accuracy_distance,
        is_equal=comparison.is_equal,
        is_within=comparison.is_within,
        not_the_same=list(differing),
        environment=machine.environment(),
    )
