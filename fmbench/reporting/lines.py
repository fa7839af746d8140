"""What a run tells people in words, a line each."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import config_dict

from fmbench import layers
from fmbench.records import machine
from fmbench.records.schema import Confidence, RunRecord


def name(entry: str, seeds: Sequence[int]) -> str:
    return f"{entry} {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def first(
    config: config_dict.ConfigDict, seeds: Sequence[int], params: Any, num_train: int, steps_per_epoch: int
) -> str:
    """What is trained on what; arrays of `params` have a first axis where there are several seeds."""
    leaves = jax.tree.leaves(params)
    num_params = sum(leaf.size for leaf in leaves) // len(seeds)
    convolutions = ""
    if any(leaf.ndim == (4 if len(seeds) == 1 else 5) for leaf in leaves):
        where = layers.describe_convolutions() if len(seeds) == 1 else "XLA"
        convolutions = f", convolutions in {where}"
    return (
        f"{name(config.entry, seeds)}: {num_params:,} trainable parameters, "
        f"{num_train:,} train images, {_counted(config.num_epochs, 'epoch')} of "
        f"{_counted(steps_per_epoch, 'step')}, {config.dtype} on {machine.describe_devices()}"
        f"{convolutions}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def epoch(epochs: Sequence[Mapping[str, Any]], num_epochs: int) -> str:
    """Of one seed, or the means of several."""
    mean = {name: statistics.fmean(one[name] for one in epochs) for name in epochs[0]}
    seeds = f", mean of {len(epochs)} seeds" if len(epochs) > 1 else ""
    return (
        f"epoch {mean['epoch']:.0f}/{num_epochs}{seeds}: loss {mean['train_loss']:.4f}, "
        f"train accuracy {mean['train_accuracy']:.2%}{watched(epochs)}, "
        f"{mean['train_images_per_sec']:,.0f} images/s, {mean['train_seconds']:.2f} s"
    )


def watched(epochs: Sequence[Mapping[str, Any]]) -> str:
    """The watched split's accuracy, of one seed or the mean of several; '' where none is watched."""
    return "".join(
        f", {name.partition('_')[0]} accuracy {statistics.fmean(one[name] for one in epochs):.2%}"
        for name in ("val_accuracy", "test_accuracy")
        if name in epochs[0]
    )


def confidence(found: Confidence) -> str:
    error = f"calibration error {found.calibration_error:.2%}"
    if found.temperature is None:
        return f"{error}; no temperature, for there are no validation images to fit it on"
    return (
        f"{error}, {found.calibration_error_at_temperature:.2%} at the temperature {found.temperature:.2f} "
        "fitted on validation"
    )


def last(record: RunRecord, num_steps: int) -> str:
    """How the run ended; `num_steps` are those of all its epochs."""
    if record.status == "interrupted":
        return f"interrupted after step {record.num_steps} of {num_steps}; the same command goes on from there."
    if record.status == "diverged":
        return (
            f"diverged: the loss is no finite number any more by step {record.num_steps}; a smaller learning rate "
            "may help."
        )
    return (
        f"test accuracy {record.test_accuracy:.2%} after {record.train_seconds:.1f} s of training "
        f"({record.train_core_seconds:.1f} core-seconds), {record.train_images_per_sec:,.0f} images/s"
    )
