"""What `python -m fmbench.reproduction --controls` and a control's script say to each other.

    <python> benchmarks/control_keras.py JOB.json

The job is a JSON file (`Job`). The script trains the net as its framework's users would, and prints a JSON object
a line on standard output:

    {"system": "Keras 3.15.1, TensorFlow 2.21.0", "versions": {...}, "num_params": n}    first
    {"train_loss": x, "train_accuracy": x, "val_accuracy": x or null}                    after each epoch

It leaves the classes that it predicts at the end of each stage in the job's `predictions`, an .npz of uint8 arrays
`<number of the stage>_test` and, if there are validation images, `<number>_validation`. Standard error is free.

This module needs no more than NumPy, so that it runs in every environment.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import protocol


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a reference system, in its own framework."""

    model: str  # a key of fmbench.models.MODELS
    arguments: dict[str, Any]  # of the model
    seed: int
    batch_size: int
    optimizer: dict[str, Any]  # the fields of fmbench's config.optimizer
    normalization: str  # unit or symmetric
    stages: list[dict[str, Any]]  # num_epochs, and augment: the fields of fmbench's config.augment
    arrays: str  # .npz: <part>_images uint8 (n, 28, 28), <part>_labels uint8 (n,); train, validation, test
    predictions: str  # .npz to be written


class Control:
    """The job, its data, and what is told of its progress."""

    def __init__(self, arguments: list[str], answers: TextIO):
        self.job = Job(**json.loads(Path(arguments[0]).read_text()))
        self.answers = answers
        self.predictions: dict[str, np.ndarray] = {}
        scale, shift = protocol.normalization_constants(self.job.normalization)
        with np.load(self.job.arrays) as arrays:
            self.labels = {part: arrays[f"{part}_labels"] for part in ("train", "validation", "test")}
            # (n, 28, 28, 1), float32
            self.images = {
                part: arrays[f"{part}_images"][..., None].astype(np.float32) * scale + shift
                for part in self.labels
            }

    def tell(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self.answers, flush=True)

    def evaluated(self) -> list[str]:
        """The parts that are not trained on and not empty."""
        return [part for part in ("validation", "test") if len(self.labels[part])]

    def end_stage(self, number: int, predict: Any) -> None:
        """Keeps what `predict(images)` classifies at the end of a stage: uint8 (n,)."""
        for part in self.evaluated():
            self.predictions[f"{number}_{part}"] = np.asarray(predict(self.images[part]), np.uint8)

    def write(self) -> None:
        np.savez(self.job.predictions, **self.predictions)  # type: ignore[arg-type]


def open_control() -> Control:
    """From the command line; whatever else is printed goes to standard error."""
    answers = protocol.claim_stdout()
    return Control(sys.argv[1:], answers)
