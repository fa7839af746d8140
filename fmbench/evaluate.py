"""Evaluates an exported model on the test set, and compares what it finds with the record of its run.

    python -m fmbench.evaluate --model=workdirs/mlp-cpu-float32-seed0

Prints accuracy, loss, and precision, recall and F1 of each class. If --model is the work directory of a completed
run, it says whether the accuracy and every single prediction are those of the run's record. An exported model by
itself is evaluated on the standard data and compared with nothing.

Exit codes: 0 done, 1 the record says otherwise, 2 something given cannot be used.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from fmbench import config
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.records import machine, schema, store
from fmbench.system import command_line, runtime
from fmbench.training import inference, input_pipeline


class Evaluation(NamedTuple):
    """What a model makes of the test set."""

    predictions: np.ndarray  # uint8 (n,)
    accuracy: float
    loss: float  # mean cross-entropy


class Comparison(NamedTuple):
    """What the record of the model's run says, and how many predictions it has otherwise."""

    accuracy: float
    same_accuracy: bool
    different_predictions: int


@command_line.plain_errors("evaluate")
def main() -> None:
    parser = command_line.Parser("evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="work directory or exported model")
    parser.add_argument(
        "--data_dir",
        help="directory with the four idx files, or a TFDS data directory (default: as in the run)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    runtime.set_up()
    sys.exit(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    model, description = exported.load_model(arguments.model)
    record = read_record(arguments.model)
    resolved = record.config if record else config.to_json(config.base_config())
    data = resolved["data"]
    dataset = fashion_mnist.of_config(data, arguments.data_dir)
    if record and dataset.sha256 != record.data_sha256:
        raise UserError(
            f"the record of {arguments.model} is on data of {record.data_version}, these are {dataset.version}; "
            "name the run's data in --data_dir."
        )
    evaluation = evaluate(model, description, dataset, resolved["eval_batch_size"])
    comparison = compare(evaluation, record, arguments.model / "record.npy") if record else None

    labels, class_names = dataset.test_labels, description["class_names"]
    if arguments.json:
        report = classification_report(labels, evaluation.predictions, class_names, output_dict=True)
        content = {
            "model": str(arguments.model),
            "data_version": dataset.version,
            "num_test": len(labels),
            "accuracy": evaluation.accuracy,
            "loss": evaluation.loss,
            "per_class": {name: report[name] for name in class_names},
            "record": comparison._asdict() if comparison else None,
        }
        print(json.dumps(content))
    else:
        print(f"{arguments.model}: {len(labels):,} test images, data of {dataset.version}")
        print(f"accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f}\n")
        print(classification_report(labels, evaluation.predictions, class_names))
        if record and comparison:
            print("\n".join(_compared(record, comparison)))
    return 1 if comparison and (comparison.different_predictions or not comparison.same_accuracy) else 0


def read_record(directory: Path) -> schema.RunRecord | None:
    """The record of the completed run in a directory, or None if there is none.

    Raises:
        UserError: If the record is damaged.
    """
    path = directory / "record.json"
    record = store.read(path) if path.exists() else None
    return record if record and record.status == "completed" else None


def evaluate(
    model: nnx.Module, description: dict[str, Any], dataset: fashion_mnist.Dataset, batch_size: int
) -> Evaluation:
    """Evaluates an exported model on every test image.

    Args:
        model: From `exported.load_model`.
        description: Likewise.
        dataset: Whose test set.
        batch_size: The run's, because the last bits of a sum may depend on it.
    """
    batches = input_pipeline.eval_calls(dataset.test_images, dataset.test_labels, batch_size, 1)
    progress = tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=None)
    logits = np.concatenate(
        [inference.logits(model, description, batch["image"].reshape(-1, 28, 28)) for batch in progress]
    )
    logits = logits[: len(dataset.test_labels)]  # the last batch is filled up
    predictions = logits.argmax(axis=-1).astype(np.uint8)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, dataset.test_labels.astype(np.int32))
    return Evaluation(predictions, float((predictions == dataset.test_labels).mean()), float(losses.mean()))


def compare(evaluation: Evaluation, record: schema.RunRecord, predictions: Path) -> Comparison:
    """Compares with the record of a completed run and the file of its predictions.

    Raises:
        UserError: If the file is missing, or not the record's.
    """
    assert record.test_accuracy is not None  # as `schema.RunRecord` sees to
    different = evaluation.predictions != store.read_predictions(record, predictions)
    return Comparison(record.test_accuracy, evaluation.accuracy == record.test_accuracy, int(different.sum()))


def classification_report(
    labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], *, output_dict: bool = False
) -> Any:
    """scikit-learn's report of precision, recall and F1, as text or by class; 0 where one is not defined."""
    from sklearn import metrics  # takes a second to import

    return metrics.classification_report(
        labels,
        predictions,
        labels=range(len(class_names)),
        target_names=class_names,
        digits=4,
        output_dict=output_dict,
        zero_division=0,
    )


def _compared(record: schema.RunRecord, comparison: Comparison) -> list[str]:
    """Lines for people."""
    if comparison.same_accuracy:
        lines = ["accuracy as in the record"]
    else:
        lines = [f"accuracy not as in the record, which says {comparison.accuracy:.2%}"]
    number, different = f"{record.num_test:,}", comparison.different_predictions
    if not different:
        return [*lines, f"all {number} predictions as in the record"]
    lines.append(f"{different:,} of {number} predictions not as in the record")
    here = _conditions(machine.environment(ask_driver=False))
    if here != _conditions(record.environment):
        lines.append(f"made on {_conditions(record.environment)}; this is {here}, which may round differently")
    return lines


def _conditions(environment: schema.Environment) -> str:
    """What decides how sums are rounded."""
    versions = ", ".join(f"{name} {environment.versions.get(name)}" for name in ("jax", "onednn-cpu-gomp"))
    return f"{environment.num_devices} x {environment.device_kind} with {versions}"


if __name__ == "__main__":
    main()
