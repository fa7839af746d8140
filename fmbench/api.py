"""fmbench from Python, under the names of `import fmbench`: train an entry, read records, use a trained model."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import nnx
from ml_collections import config_dict

from fmbench import entries
from fmbench.errors import UserError
from fmbench.models import MODELS, exported
from fmbench.records import machine, schema, store
from fmbench.records.schema import RunRecord
from fmbench.studies import memory
from fmbench.system import runtime
from fmbench.system.places import local_path
from fmbench.training import inference
from fmbench.training.run import train_seeds


def train(
    config: str,
    *,
    workdir: str | PathLike[str] | None = None,
    results_dir: str | PathLike[str] | None = None,
    force: bool = False,
    **overrides: Any,
) -> RunRecord:
    """Trains an entry and returns its record, whose accuracy its predictions prove, as `fmbench train` does.

        record = fmbench.train("mlp", num_epochs=2, **{"optimizer.learning_rate": 1e-3})
        record.entry, record.test_accuracy, record.train_seconds

    Ctrl-C, or a notebook's stop button, saves a checkpoint; the same call goes on from there.

    Args:
        config: As --config has it: 'mlp', 'speedrun:94', the path of a file.
        workdir: Work directory of the run. Default: workdirs/<name of the record>.
        results_dir: The record goes to <results_dir>/runs. Default: `default_results_dir`.
        force: Start anew, throwing away what the work directory holds.
        overrides: Fields of the config by their dotted names, see `fmbench train --help`.

    Returns:
        The record, with status 'completed' or 'diverged'.

    Raises:
        UserError: If something that was given cannot be used.
        KeyboardInterrupt: If the run was stopped.
    """
    resolved = entries.resolve(config, overrides)
    (record,) = run(
        resolved,
        default_workdir(resolved) if workdir is None else local_path(workdir),
        default_results_dir(resolved) if results_dir is None else local_path(results_dir),
        force=force,
    )
    if record.status == "interrupted":
        raise KeyboardInterrupt(f"{record.entry} is interrupted; the same call goes on from there.")
    return record


def run(
    config: config_dict.ConfigDict,
    workdir: Path,
    results_dir: Path,
    *,
    seeds: Sequence[int] = (),
    force: bool = False,
    trackers: Sequence[str] = (),
) -> list[RunRecord]:
    """Trains a config from `entries.resolve`, with its own seed or several in one program: a record for each.

    `trackers` are told of them, too: 'wandb', 'mlflow'.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax has much to say
    runtime.set_up()
    seeds = seeds or (config.seed,)
    with memory.explained(config, seeds):
        return train_seeds(config, seeds, workdir, results_dir=results_dir, force=force, trackers=trackers)


def default_workdir(config: config_dict.ConfigDict, seeds: Sequence[int] = ()) -> Path:
    """In workdirs/, named like the record but for the machine, by the first seed and how many others."""
    runtime.set_up()
    seeds = seeds or (config.seed,)
    name = schema.workdir_name(config.entry, machine.environment(ask_driver=False), config.dtype, seeds[0])
    if len(seeds) > 1:
        name += f"-with{'-'.join(map(str, seeds[1:]))}"
    if config.data.source in ("csv", "idx"):  # of which version is not known before they are read
        name += f"-{config.data.source}"
    return Path("workdirs") / name


def default_results_dir(config: config_dict.ConfigDict) -> Path:
    """results/, where records are ranked and kept; trials/, where flags or edits changed the entry or the code."""
    runtime.set_up()
    is_trial = "+" in config.entry or machine.environment(ask_driver=False).git_dirty
    return Path("trials" if is_trial else "results")


def read_records(results_dir: str | PathLike[str] = "results") -> list[RunRecord]:
    """The records of <results_dir>/runs, validated, in the order of their names.

        best = max(fmbench.read_records("results"), key=lambda record: record.test_accuracy or 0)

    Raises:
        UserError: If there is no such directory, or a record is damaged; names the file and the field.
    """
    if not (local_path(results_dir) / "runs").is_dir():
        raise UserError(f"{results_dir} holds no records: it has no folder 'runs'.")
    return list(store.read_all(local_path(results_dir)).values())


class Classifier:
    """A trained model as a function; from `load_model`.

    Attributes:
        class_names: Of the ten classes, in the order of the probabilities.
        entry: Whose model it is.
    """

    def __init__(self, model: nnx.Module, description: dict[str, Any]) -> None:
        """Takes what `exported.load_model` returns."""
        self._classify = inference.make_classifier(model, description)
        self.class_names: list[str] = list(description["class_names"])
        self.entry: str = description.get("entry", "")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities of the classes, float32 (n, 10), of images, uint8 (n, 28, 28), light on black.

        They are calibrated, if the model's run had validation images.

        Raises:
            UserError: If the images have another shape or type.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
            raise UserError(f"images are {images.dtype} {images.shape}; they must be uint8 (n, 28, 28).")
        starts = range(0, len(images), inference.BATCH_SIZE)
        parts = [self._classify(images[start : start + inference.BATCH_SIZE]) for start in starts]
        return np.concatenate([np.zeros((0, len(self.class_names)), np.float32), *parts])


def load_model(workdir: str | PathLike[str]) -> Classifier:
    """The model of a completed run, as a function from images to probabilities.

        model = fmbench.load_model("workdirs/mlp-cpu-float32-seed0")
        probabilities = model(images)  # uint8 (n, 28, 28) -> float32 (n, 10)
        model.class_names[probabilities[0].argmax()]

    Args:
        workdir: The run's work directory, or an exported model.

    Raises:
        UserError: If there is no model, or not of this version of fmbench.
    """
    runtime.set_up()
    return Classifier(*exported.load_model(local_path(workdir)))


def list_models() -> list[str]:
    """What config.model.name may be: 'mlp', 'cnn1', ..."""
    return list(MODELS)


def list_configs() -> list[str]:
    """The shipped entries, as `train` and --config take them: 'mlp', 'mlp:best', 'speedrun:94', ..."""
    return entries.specs()
