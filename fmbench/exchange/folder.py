"""The folder of an exported model: its files, a card and the record; proven before it is there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fmbench.errors import UserError
from fmbench.exchange import hugging_face, program
from fmbench.records import store
from fmbench.system import command_line, sealed
from fmbench.training import inference

CARD, RECORD, PREDICTIONS = "README.md", "record.json", "record.npy"
FILES = {
    "safetensors": {
        "model.safetensors": "the weights by their names in the net, float32; kernels are (height, width, inputs, "
        "outputs) and (inputs, outputs); the metadata, JSON each, name the net, its arguments and normalization"
    },
    "stablehlo": {
        "model.bin": "the net with its weights: `jax.export.deserialize(bytearray(open('model.bin', 'rb').read()))"
        ".call(images)`, images uint8 (n, 28, 28), gives logits, float32 (n, 10), on CPUs, CUDA and TPUs",
        "model.mlir": "the same as StableHLO's text",
    },
    "onnx": {
        "model.onnx": "the net with its weights: `images`, uint8 (batch, 28, 28), to `logits`, float32 (batch, 10)"
    },
}
FURTHER = {
    RECORD: "the record of the run: config, seed, data, versions, machine, times, accuracies",
    PREDICTIONS: "the classes that it predicted for the test images, uint8",
    sealed.SEAL: "sizes and SHA-256 of the other files",
}
# Of a logit, beyond which an export is another net; docs/exporting.md has what rounding makes.
TOLERANCE = {"float32": 1e-2, "bfloat16": 1.0}


class Comparison(NamedTuple):
    """What an export makes of the test images, beside the model and the record of its run."""

    num_test: int
    largest: float  # difference of a logit
    differing: int  # predictions not as in the record

    def __str__(self) -> str:
        predictions = f"{self.differing:,} predictions not as" if self.differing else "all predictions as"
        return (
            f"Compared on {self.num_test:,} test images: logits differ from fmbench's by {self.largest:.1e} at "
            f"most, {predictions} in the record."
        )


def export(workdir: Path, format: str, output: Path, *, force: bool = False) -> Comparison | None:
    """Writes the exported model of a completed run in a form that others read.

    Args:
        workdir: Of the run.
        format: 'safetensors', 'stablehlo' or 'onnx'.
        output: The new folder.
        force: Whether to replace an export that is there.

    Returns:
        What it was found to compute; None for safetensors, which computes nothing, and has every bit.

    Raises:
        UserError: If there is no completed run, its model is damaged or not of a kind that the form has, or
            `output` is there.
    """
    output = output.absolute()
    if output.exists() or output.is_symlink():
        if not force:
            raise UserError(f"--output={output} is there already; name a new folder, or replace it with --force.")
        if not all((output / name).is_file() for name in (CARD, RECORD, sealed.SEAL)):
            raise UserError(f"--output={output} is no export, so --force leaves it; name a new folder.")
    with command_line.needs_extra("export"):
        write = _writer(format)
    record, dataset = store.read_run(workdir)
    predictions = store.read_predictions(record, workdir / PREDICTIONS)
    model = program.load(workdir)
    with sealed.sealed_folder(output) as partial:
        run = write(model, partial)
        comparison, checked = None, "Every bit of the weights is that of the trained model."
        if run:
            batch_size = record.config["eval_batch_size"]
            comparison = _compare(run, model, dataset.test_images, predictions, batch_size)
            checked = str(comparison)
            if not comparison.largest <= TOLERANCE[record.dtype]:
                raise UserError(f"--format={format}: nothing is written, for it is not the same net. {checked}")
        for name in (RECORD, PREDICTIONS):
            shutil.copyfile(workdir / name, partial / name)
        temperature = model.description.get("temperature")
        card = hugging_face.card(record, FILES[format] | FURTHER, checked, temperature)
        (partial / CARD).write_text(card, encoding="utf-8")
    return comparison


def _writer(format: str) -> Callable[[program.Program, Path], Callable[[np.ndarray], np.ndarray] | None]:
    """What writes a form; with it come packages of an extra."""
    if format == "safetensors":
        from fmbench.exchange import weights

        return weights.write
    if format == "onnx":
        from fmbench.exchange import onnx_graph

        return onnx_graph.write
    from fmbench.exchange import stablehlo

    return stablehlo.write


def _compare(
    run: Callable[[np.ndarray], np.ndarray],
    model: program.Program,
    images: np.ndarray,
    predictions: np.ndarray,
    batch_size: int,
) -> Comparison:
    differences, found = [], []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc="comparing", unit="batch", leave=False, disable=None):
        batch = images[start : start + batch_size]
        logits = run(batch)
        expected = inference.logits(model.model, model.description, batch)
        differences.append(np.abs(logits - expected).max())
        found.append(logits.argmax(axis=-1))
    largest = float(np.max(differences))  # NaN, if there is one
    return Comparison(len(images), largest, int((np.concatenate(found) != predictions).sum()))
