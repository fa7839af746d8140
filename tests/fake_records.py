"""Records of runs that never were, and the small data set they claim to be made on."""

from pathlib import Path
from typing import Any

import numpy as np

from fmbench import config as config_lib
from fmbench.data import fashion_mnist
from fmbench.records import schema, store
from fmbench.records.schema import RunRecord

LABELS = np.repeat(np.arange(10, dtype=np.uint8), 20)
SHA256 = {"t10k-labels": "0" * 64}
VERSION = "2017-08-31"
ENVIRONMENT: dict[str, Any] = {
    "device_platform": "cpu",
    "device_kind": "Abacus 9",
    "num_devices": 1,
    "num_processes": 1,
    "cpu": "Abacus 9",
    "cpu_cores": 2,
    "operating_system": "Linux",
    "python": "3.13.0",
    "versions": {"jax": "0.10.0"},
    "xla_flags": "",
    "git_commit": "c0ffee",
    "git_dirty": False,
}
EPOCH: dict[str, Any] = {
    "epoch": 1,
    "step": 10,
    "learning_rate": 0.001,
    "train_loss": 0.5,
    "train_accuracy": 0.8,
    "train_seconds": 10.0,
    "train_core_seconds": 20.0,
    "train_images_per_sec": 1000.0,
    "val_loss": 0.4,
    "val_accuracy": 0.85,
}


def fake_dataset(version: str = VERSION) -> fashion_mnist.Dataset:
    """Stands in for `fashion_mnist.load`: test labels and hashes, no images."""
    nothing = np.zeros((0, 28, 28), np.uint8)
    return fashion_mnist.Dataset(nothing, nothing[:, 0, 0], nothing, LABELS, version, SHA256)


def predictions_with(wrong: int) -> np.ndarray:
    """The true labels, but for the first `wrong` images."""
    predictions = LABELS.copy()
    predictions[:wrong] += 1
    return predictions


def make_record(
    entry: str = "mlp",
    seed: int = 0,
    *,
    wrong: int = 20,
    dtype: str = "float32",
    config: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    **changes: Any,
) -> RunRecord:
    """A valid record of a completed run of one epoch that classified all but the first `wrong` images rightly.

    Args:
        entry: Name on the leaderboard.
        seed: Of the run.
        wrong: Images it got wrong.
        dtype: Of the computation.
        config: Changes of the config, by top-level field.
        environment: Changes of the environment.
        **changes: Other fields of the record, whether they fit the rest or not.
    """
    predictions = predictions_with(wrong)
    correct = predictions == LABELS
    names = {"entry": entry, "config_file": f"configs/{entry}.py", "seed": seed, "dtype": dtype, "num_epochs": 1}
    resolved = config_lib.to_json(config_lib.base_config()) | names | (config or {})
    return RunRecord(
        **{
            "schema_version": 1,
            "status": "completed",
            "created": "2026-01-01T00:00:00+00:00",
            "config": resolved,
            **{field: resolved[field] for field in ("entry", "config_file", "seed", "dtype")},
            **{field: resolved[field] for field in ("parallel", "batch_size")},
            "steps_per_call": 1,
            "model": entry,
            "num_params": 384_854,
            "num_trainable_params": 384_854,
            "flops_per_image": 1e6,
            "data_version": VERSION,
            "data_sha256": SHA256,
            "num_train": 55_000,
            "num_validation": 5_000,
            "num_test": len(LABELS),
            "watched": "validation",
            "num_epochs": 1,
            "num_steps": 10,
            "num_resumes": 0,
            "train_loss": 0.5,
            "train_accuracy": 0.8,
            "val_loss": 0.4,
            "val_accuracy": 0.85,
            "test_loss": 0.4,
            "test_accuracy": float(correct.mean()),
            "test_top5_accuracy": 0.99,
            "test_per_class_accuracy": correct.reshape(10, -1).mean(axis=1).tolist(),
            "predictions_sha256": schema.predictions_sha256(predictions),
            "setup_seconds": 1.0,
            "compile_seconds": 3.0,
            "compile_cached": False,
            "train_seconds": 10.0,
            "eval_seconds": 1.0,
            "checkpoint_seconds": 0.5,
            "train_core_seconds": 20.0,
            "eval_core_seconds": 2.0,
            "wall_seconds": 16.0,
            "train_images_per_sec": 1000.0,
            "eval_images_per_sec": 4000.0,
            "step_time_ms": 256.0,
            "peak_memory_bytes": 2**30,
            "time_to_target": {"90": 5.0, "92": 10.0, "94": None},
            "history": [EPOCH],
            "environment": ENVIRONMENT | (environment or {}),
            **changes,
        }
    )


def make_unfinished(status: str, entry: str = "mlp", seed: int = 0, **changes: Any) -> RunRecord:
    """The record of a run that was stopped before its test."""
    untested = dict.fromkeys(
        ("test_loss", "test_accuracy", "test_top5_accuracy", "test_per_class_accuracy", "predictions_sha256")
    )
    return make_record(entry, seed, **{"status": status, **untested, **changes})


def publish(record: RunRecord, results_dir: Path, *, wrong: int = 20) -> Path:
    """Writes a record to <results_dir>/runs as a run would, with the predictions of `make_record(wrong=...)`."""
    stem = results_dir / "runs" / record.name
    store.write(record, predictions_with(wrong) if record.status == "completed" else None, stem)
    return stem.with_name(f"{record.name}.json")
