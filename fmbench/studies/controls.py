"""Controls: each reference system once more in the framework it was published in, beside our entry for it."""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench import entries
from fmbench.data import fashion_mnist, proof
from fmbench.errors import UserError, nearest
from fmbench.records import controls, machine
from fmbench.records.controls import ControlEpoch, ControlRecord, ControlStage
from fmbench.records.schema import predictions_sha256
from fmbench.studies import cross_validation
from fmbench.system import peers

NUM_FOLDS = 5


class Control(NamedTuple):
    """An entry that a reference system has a counterpart of."""

    spec: str  # as --config takes it
    framework: str
    is_cross_validated: bool = False
    num_epochs: int = 0  # the first so many; 0: all

    @property
    def name(self) -> str:
        """What --entries calls it: cnn1, baseline-same."""
        return self.spec.replace(":", "-")


# In the order of their cost.
CONTROLS = (
    *(Control(spec, "torch") for spec in ("fc:a", "fc:b")),
    *(Control(spec, "keras", num_epochs=10) for spec in ("cnn1", "cnn3")),
    Control("baseline", "keras", is_cross_validated=True),
    *(Control(spec, "keras") for spec in ("baseline", "mlp", "cnn2")),
    Control("cnn4", "keras", num_epochs=10),
    *(Control(spec, "keras", is_cross_validated=True) for spec in ("baseline:same", "baseline:same64")),
    *(Control(spec, "keras") for spec in ("cnn1", "cnn3", "vgg_like", "cnn4")),
)


def choose(frameworks: Sequence[str], names: Sequence[str]) -> list[Control]:
    """The controls in these frameworks, of these entries if any are named.

    Raises:
        UserError: If there is no such framework or entry, or none of the entries has a control in the frameworks.
    """
    known = sorted({control.name for control in CONTROLS})
    for given, allowed, flag in ((frameworks, peers.PEERS, "controls"), (names, known, "entries")):
        if unknown := [name for name in given if name not in allowed]:
            raise UserError(
                f"--{flag}: there is no '{unknown[0]}'{nearest(unknown[0], allowed)}; "
                f"there are {', '.join(allowed)}."
            )
    chosen = [
        control for control in CONTROLS if control.framework in frameworks and (not names or control.name in names)
    ]
    if not chosen:
        raise UserError(f"none of {', '.join(names)} was published in {', '.join(frameworks)}.")
    return chosen


def runs_of(control: Control, seed: int) -> Iterator[config_dict.ConfigDict]:
    """The configs of a control's runs with a seed: one, or one for each fold."""
    overrides = {"seed": str(seed)}
    if control.num_epochs:
        overrides["num_epochs"] = str(control.num_epochs)
    config = entries.resolve(control.spec, overrides)
    if not control.is_cross_validated:
        yield config
        return
    for fold in range(NUM_FOLDS):
        yield cross_validation.fold_config(config, fold, NUM_FOLDS)


def train(frameworks: Sequence[str], names: Sequence[str], num_seeds: int, results_dir: Path) -> None:
    """Trains what is chosen, with the seeds 0 to num_seeds - 1, but for what has its record already.

    Raises:
        UserError: If a choice is none, a framework's environment is missing, or a run fails.
    """
    chosen = choose(frameworks, names)
    peers.check(frameworks, "a control")
    runs = [
        (control.framework, config)
        for control in chosen
        for seed in range(num_seeds)
        for config in runs_of(control, seed)
    ]
    for number, (framework, config) in enumerate(runs, start=1):
        name = controls.control_name(config.entry, framework, config.seed)
        title = f"[{number}/{len(runs)}] {name}"
        if (results_dir / controls.DIRECTORY / f"{name}.json").exists():
            print(f"{title}: done before", flush=True)
            continue
        record = _run(title, framework, config, results_dir)
        accuracies = ", ".join(f"{100 * stage.test_accuracy:.2f}" for stage in record.stages)
        print(f"{title}: test accuracy {accuracies} %, {record.wall_seconds:.0f} s", flush=True)


def _run(title: str, framework: str, config: config_dict.ConfigDict, results_dir: Path) -> ControlRecord:
    """Trains one control, and leaves its record."""
    dataset = fashion_mnist.load()
    recipe = config_lib.to_json(config)
    train_rows, validation_rows = controls.split(recipe, dataset.train_labels)
    stages = config_lib.stages(config)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arrays, predictions, job = (Path(folder) / name for name in ("arrays.npz", "predictions.npz", "job.json"))
        np.savez(
            arrays,
            train_images=dataset.train_images[train_rows],
            train_labels=dataset.train_labels[train_rows],
            validation_images=dataset.train_images[validation_rows],
            validation_labels=dataset.train_labels[validation_rows],
            test_images=dataset.test_images,
            test_labels=dataset.test_labels,
        )
        job.write_text(json.dumps(_job(recipe, stages) | {"arrays": str(arrays), "predictions": str(predictions)}))
        begin, *epochs = _listen(title, framework, job, config.num_epochs)
        wall_seconds = time.monotonic() - began
        with np.load(predictions) as classes:
            test = np.stack([classes[f"{number}_test"] for number in range(1, len(stages) + 1)])
            held_out = None
            if len(validation_rows):
                held_out = np.stack([classes[f"{number}_validation"] for number in range(1, len(stages) + 1)])
    scored = held_out if config.data.split == "kfold" else None
    val_labels = dataset.train_labels[validation_rows]
    record = ControlRecord(
        created=machine.now(),
        framework=framework,  # type: ignore[arg-type]
        entry=config.entry,
        config=recipe,
        seed=config.seed,
        **begin,
        data_version=proof.STANDARD,
        data_sha256=dataset.sha256,
        num_train=len(train_rows),
        num_validation=len(validation_rows),
        num_test=len(dataset.test_labels),
        wall_seconds=wall_seconds,
        history=[ControlEpoch(**epoch) for epoch in epochs],
        stages=[
            ControlStage(
                num_epochs=stage.num_epochs,
                test_accuracy=controls.accuracy(test[index], dataset.test_labels),
                val_accuracy=None if held_out is None else controls.accuracy(held_out[index], val_labels),
            )
            for index, stage in enumerate(stages)
        ],
        predictions_sha256=predictions_sha256(test),
        val_predictions_sha256=None if scored is None else predictions_sha256(scored),
        environment=machine.environment(ask_driver=False),
    )
    controls.write(record, test, scored, results_dir)
    return record


def _job(recipe: dict[str, Any], stages: Sequence[config_lib.Stage]) -> dict[str, Any]:
    """What a control's script is told, but for its files; see benchmarks/control.py."""
    model = dict(recipe["model"])
    return {
        "model": model.pop("name"),
        "arguments": model,
        "seed": recipe["seed"],
        "batch_size": recipe["batch_size"],
        "optimizer": recipe["optimizer"],
        "normalization": recipe["data"]["normalization"],
        "stages": [{"num_epochs": stage.num_epochs, "augment": dict(stage.augment)} for stage in stages],
    }


def _listen(title: str, framework: str, job: Path, num_epochs: int) -> list[dict[str, Any]]:
    """Runs the control's script to its end, and shows its epochs on standard error; returns what it told.

    Raises:
        UserError: If it fails; with the last line that it said.
    """
    command = [str(peers.interpreter(framework)), str(peers.BENCHMARKS / f"control_{framework}.py"), str(job)]
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout
            for line in process.stdout:
                told.append(json.loads(line))
                if len(told) > 1:
                    loss, accuracy = (told[-1][name] for name in ("train_loss", "val_accuracy"))
                    validated = "" if accuracy is None else f", val accuracy {accuracy:.2%}"
                    peers.say(f"{title}: epoch {len(told) - 1}/{num_epochs}: loss {loss:.4f}{validated}")
            if process.wait():
                stderr.seek(0)
                words = peers.last_line(stderr.read().decode(errors="replace"))
                raise UserError(f"{title}: ended with exit code {process.returncode}: {words[:200]}")
        finally:
            process.kill()
            process.wait()
    return told
