"""What a run writes down: its epochs and stages as they end, and at last its record."""

import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import config_dict

from fmbench import config as config_lib
from fmbench.records import machine
from fmbench.records.processes import ProcessList
from fmbench.records.schema import TARGETS, Epoch, RunRecord, StageResult, Status, predictions_sha256
from fmbench.system.load import Load
from fmbench.system.timing import Lap, Stopwatch
from fmbench.training import steps
from fmbench.training.input_pipeline import Data
from fmbench.training.steps import Evaluation, TrainState

TIMED = ("setup", "compile", "train", "eval", "checkpoint")


class Diary:
    """What is known of a run so far: plain JSON, so that a checkpoint can hold it.

    Attributes:
        history: The finished epochs, as `records.schema.Epoch` has them.
        stages: The finished stages, as `records.schema.StageResult` has them.
        epoch: Sums over the steps of the present epoch.
        diverged: Whether the loss is no finite number any more.
    """

    def __init__(
        self,
        history: list[dict[str, Any]] | None = None,
        stages: list[dict[str, Any]] | None = None,
        epoch: dict[str, Any] | None = None,
        diverged: bool = False,
    ):
        self.history = history or []
        self.stages = stages or []
        self.epoch = epoch or _no_sums()
        self.diverged = diverged

    def to_json(self) -> dict[str, Any]:
        """The arguments that make this diary again."""
        return dict(vars(self))

    def add_steps(self, metrics: Mapping[str, np.ndarray], lap: Lap) -> None:
        """Adds up steps: their `loss` and `accuracy`, float (n,), and the time they took together."""
        self.epoch["steps"] += len(metrics["loss"])
        for name in ("loss", "accuracy"):
            self.epoch[name] += float(metrics[name].sum(dtype=np.float64))
        self.epoch["seconds"] += lap.seconds
        self.epoch["core_seconds"] += lap.core_seconds
        self.epoch["gap_seconds"] += lap.gap
        self.epoch["asleep_seconds"] = self.epoch.get("asleep_seconds", 0.0) + lap.asleep
        for name, value in lap.load._asdict().items() if lap.load else ():
            if value is not None:  # all but the average are counts
                added = lap.seconds * value if name == "load_average" else value
                self.epoch[name] = self.epoch.get(name, 0) + added

    def end_epoch(
        self, data: Data, step: int, learning_rate: float, evaluations: Mapping[str, Evaluation]
    ) -> dict[str, Any]:
        """Turns the sums into an epoch of the history, and returns it."""
        sums, self.epoch = self.epoch, _no_sums()
        epoch = {
            "epoch": step // data.steps_per_epoch,
            "step": step,
            "learning_rate": learning_rate,
            "train_loss": sums["loss"] / sums["steps"],
            "train_accuracy": sums["accuracy"] / sums["steps"],
            "train_seconds": sums["seconds"],
            "train_core_seconds": sums["core_seconds"],
            "train_images_per_sec": data.images_per_epoch / sums["seconds"],
            "gap_seconds": sums["gap_seconds"],
            **{name: sums[name] for name in ("asleep_seconds", *Load._fields) if name in sums},
        }
        if "load_average" in epoch:
            epoch["load_average"] /= sums["seconds"]
        if data.watched:
            evaluation = evaluations[data.watched]
            prefix = "val" if data.watched == "validation" else "test"
            epoch |= {f"{prefix}_loss": evaluation.loss, f"{prefix}_accuracy": evaluation.accuracy}
        self.history.append(epoch)
        return epoch

    def end_stage(self, stage: config_lib.Stage, evaluations: Mapping[str, Evaluation]) -> None:
        """Adds a stage whose last epoch ends the history."""
        epochs = self.history[-stage.num_epochs :]
        validation = evaluations.get("validation")
        self.stages.append(
            {
                "name": stage.name,
                "num_epochs": stage.num_epochs,
                "learning_rate": stage.learning_rate,
                "augment": {
                    name: strength if name == "function" else float(strength)
                    for name, strength in stage.augment.items()
                },
                "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
                "train_core_seconds": sum(epoch["train_core_seconds"] for epoch in epochs),
                "val_accuracy": validation.accuracy if validation else None,
                "test_accuracy": evaluations["test"].accuracy,
            }
        )

    def is_stuck(self, patience: int) -> bool:
        """Whether the best validation accuracy is `patience` epochs old; 0: never."""
        if not patience or not self.history:
            return False
        accuracies = [epoch["val_accuracy"] for epoch in self.history]
        best = accuracies.index(max(accuracies))
        return len(accuracies) - 1 - best >= patience


def is_finite(evaluations: Mapping[str, Evaluation]) -> bool:
    return all(math.isfinite(evaluation.loss) for evaluation in evaluations.values())


def make_record(
    config: config_dict.ConfigDict,
    status: Status,
    data: Data,
    state: TrainState,
    diary: Diary,
    evaluations: Mapping[str, Evaluation],
    stopwatch: Stopwatch,
    processes: ProcessList,
    num_hosts: int | None = None,
    **measured: Any,
) -> RunRecord:
    """The record of a run that has ended.

    Args:
        config: Of the run.
        status: How it ended.
        data: What it trained on.
        state: Its last one.
        diary: Its epochs and stages.
        evaluations: Of the last state, by split; none, if the run was not completed.
        stopwatch: Its times.
        processes: That made it.
        num_hosts: Machines of processes that trained together.
        measured: Further fields of the record, as they are.
    """
    history = [Epoch(**epoch) for epoch in diary.history]
    return RunRecord(
        schema_version=2,
        status=status,
        created=machine.now(),
        config=config_lib.to_json(config),
        model=config.model.name,
        **{name: config[name] for name in ("entry", "config_file", "seed", "dtype", "parallel", "batch_size")},
        num_params=steps.count(state.params) + steps.count(state.model_state),
        num_trainable_params=steps.count(state.params),
        data_version=data.version,
        data_sha256=data.sha256,
        **{name: getattr(data, name) for name in ("num_train", "num_validation", "num_test", "watched")},
        num_epochs=len(history),
        num_steps=int(state.step),
        num_resumes=processes.num_resumes,
        **_accuracies(history, evaluations),
        val_predictions_sha256=_fold_sha256(config, evaluations),
        **_times(stopwatch),
        **_speed(config.batch_size, history),
        time_to_target=time_to_target(history, data.watched),
        history=history,
        stages=[StageResult(**stage) for stage in diary.stages],
        environment=processes.environment().model_copy(update={"num_hosts": num_hosts}),
        processes=processes.all,
        **measured,
    )


def _accuracies(history: list[Epoch], evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    last = history[-1] if history else None
    test, validation = evaluations.get("test"), evaluations.get("validation")
    return {
        "train_loss": last.train_loss if last else None,
        "train_accuracy": last.train_accuracy if last else None,
        "val_loss": validation.loss if validation else None,
        "val_accuracy": validation.accuracy if validation else None,
        "test_loss": test.loss if test else None,
        "test_accuracy": test.accuracy if test else None,
        "test_top5_accuracy": test.top5_accuracy if test else None,
        "test_per_class_accuracy": test.per_class_accuracy if test else None,
        "predictions_sha256": predictions_sha256(test.predictions) if test else None,
    }


def _fold_sha256(config: config_dict.ConfigDict, evaluations: Mapping[str, Evaluation]) -> str | None:
    is_fold = config.data.split == "kfold" and "validation" in evaluations
    return predictions_sha256(evaluations["validation"].predictions) if is_fold else None


def _times(stopwatch: Stopwatch) -> dict[str, Any]:
    return {f"{name}_seconds": stopwatch.seconds[name] for name in TIMED} | {
        f"{name}_core_seconds": stopwatch.core_seconds[name] for name in ("train", "eval")
    }


def _speed(batch_size: int, history: list[Epoch]) -> dict[str, Any]:
    speed = statistics.median(epoch.train_images_per_sec for epoch in history) if history else None
    return {"train_images_per_sec": speed, "step_time_ms": 1000 * batch_size / speed if speed else None}


def time_to_target(history: list[Epoch], watched: str | None) -> dict[str, float | None]:
    """Training seconds at the first end of an epoch at or above each target; None for a miss."""
    seconds = list(itertools.accumulate(epoch.train_seconds for epoch in history))
    accuracies = [epoch.val_accuracy if watched == "validation" else epoch.test_accuracy for epoch in history]
    return {
        target: next(
            (s for s, a in zip(seconds, accuracies, strict=True) if a is not None and a >= int(target) / 100),
            None,
        )
        for target in TARGETS
    }


def _no_sums() -> dict[str, Any]:
    """What an epoch adds up, step by step."""
    return {"steps": 0, "loss": 0.0, "accuracy": 0.0, "seconds": 0.0, "core_seconds": 0.0, "gap_seconds": 0.0}
