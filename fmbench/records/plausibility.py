"""Whether a record can be true: what contradicts itself is refused, what no trained net does is marked.

Of a record only the accuracy follows from what is stored with it, the predictions; all else is what the run said
of itself. docs/measuring.md has the rules with the measurements behind them.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fmbench.config import complete
from fmbench.data import proof
from fmbench.errors import UserError
from fmbench.records.schema import RunRecord

TOLERANCE = 0.01  # of sums of times

# FLOP/s that no core and no accelerator of today reaches: AVX-512 at 6 GHz does 0.4e12 in float32, Intel's AMX
# 6e12 in bfloat16, the fastest GPUs 5e15.
PEAK_CORE_FLOPS = {"float32": 1e12, "bfloat16": 8e12}
PEAK_ACCELERATOR_FLOPS = 1e16

# Shared errors, see `shared_errors`, on Fashion-MNIST's 10,000 test images.
SEEN_SHARED = (0.57, 0.70)  # the median over other entries, least and most of the committed records
LEAST_SHARED, MOST_SHARED = 0.45, 0.80  # of that median
SEEN_TWINS = 0.84  # the most of two nets of unlike seeds or models
MOST_TWINS = 0.92
FEWEST_ENTRIES = 3  # others that a median is taken of
FEWEST_IMAGES = 1000  # on fewer, chance decides what is shared, and how far accuracies lie apart

MOST_APART = 0.03  # validation and test accuracy; up to 0.011 were seen, and chance alone gives 0.004


def refuse_contradictions(records: Mapping[Path, RunRecord]) -> None:
    """Refuses completed runs whose record contradicts itself.

    Raises:
        UserError: Names the file, the field, and what contradicts it.
    """
    for path, record in records.items():
        if record.status == "completed" and (what := contradiction(record)):
            raise UserError(f"{path}: {what}; the record contradicts itself. Delete it and run the entry again.")


def contradiction(record: RunRecord) -> str:
    """What in a completed run's record contradicts the rest of it; '' if nothing does."""
    history = record.history
    planned = record.config["num_epochs"]
    if [epoch.epoch for epoch in history] != list(range(1, record.num_epochs + 1)) or not history:
        return f"history has not the epochs 1 to {record.num_epochs} of num_epochs in their order"
    if record.num_epochs < planned and not record.config.get("early_stopping_patience"):
        return f"num_epochs is {record.num_epochs}, but the config's, without early stopping, {planned}"
    steps = record.num_train / record.batch_size
    if history[0].step not in (math.floor(steps), math.ceil(steps)):
        return f"history.0.step is {history[0].step}, but num_train / batch_size {steps:g}"
    if [epoch.step for epoch in history] != [history[0].step * epoch.epoch for epoch in history]:
        return "history.step does not grow by the same number of steps every epoch"
    if record.num_steps != history[-1].step:
        return f"num_steps is {record.num_steps}, but history ends with step {history[-1].step}"
    for field in ("train_seconds", "train_core_seconds"):
        total = sum(getattr(epoch, field) for epoch in history)
        if not _is_near(getattr(record, field), total):
            return f"{field} is {getattr(record, field):g}, but that of all epochs in history {total:g}"
    for epoch in history:
        speed = history[0].step * record.batch_size / epoch.train_seconds if epoch.train_seconds else math.inf
        if not _is_near(epoch.train_images_per_sec, speed):
            return (
                f"history.{epoch.epoch - 1}.train_images_per_sec is {epoch.train_images_per_sec:g}, "
                f"but its images and seconds give {speed:g}"
            )
    median = statistics.median(epoch.train_images_per_sec for epoch in history)
    if not _is_near(record.train_images_per_sec, median):
        return f"train_images_per_sec is {record.train_images_per_sec}, but history's median {median:g}"
    parts = ("setup", "compile", "train", "eval", "checkpoint")
    total = sum(getattr(record, f"{part}_seconds") for part in parts)
    if record.wall_seconds < (1 - TOLERANCE) * total:
        return f"wall_seconds is {record.wall_seconds:g}, but the parts of it are {total:g} together"
    is_known = record.data_version == proof.STANDARD and record.val_accuracy is not None
    if is_known and min(record.num_validation, record.num_test) >= FEWEST_IMAGES:
        val_accuracy, test_accuracy = record.val_accuracy or 0.0, record.test_accuracy or 0.0
        if abs(val_accuracy - test_accuracy) > MOST_APART:
            return f"val_accuracy is {val_accuracy}, but the predictions give a test_accuracy of {test_accuracy}"
    return _watched_contradiction(record)


def _watched_contradiction(record: RunRecord) -> str:
    """What contradicts the accuracies that the history has of the watched split."""
    field = "val_accuracy" if record.watched == "validation" else "test_accuracy"
    accuracies = [getattr(epoch, field) if record.watched else None for epoch in record.history]
    if record.watched and (None in accuracies or accuracies[-1] != getattr(record, field)):
        return f"{field} is {getattr(record, field)}, but that of the last epoch {accuracies[-1]}"
    seconds = list(itertools.accumulate(epoch.train_seconds for epoch in record.history))
    for target, claimed in record.time_to_target.items():
        reached = [s for s, a in zip(seconds, accuracies, strict=True) if a is not None and a >= int(target) / 100]
        if not _is_near(claimed, reached[0] if reached else None):
            return f"time_to_target.{target} is {claimed}, but history gives {reached[0] if reached else None}"
    return ""


def _is_near(value: float | None, expected: float | None) -> bool:
    if value is None or expected is None:
        return value is expected
    return math.isclose(value, expected, rel_tol=TOLERANCE)


def shared_errors(wrong: np.ndarray) -> np.ndarray:
    """How many of the errors of the better of two nets the other one makes too, beyond chance.

    With a and b the shares of images that two nets get wrong, and c that of those which both do, it is
    (c - a b) / (min(a, b) - a b): 0 if errors are independent of each other, 1 if one net makes all errors of the
    other. It is Cohen's kappa of "wrong", the error consistency of Geirhos et al., divided by the most that it
    can be at these accuracies, so that nets of unlike accuracy can be compared.

    Args:
        wrong: bool (nets, num_images).

    Returns:
        float (nets, nets); NaN where one of the two makes no error or nothing else.

    References:
        Geirhos, Meding and Wichmann, 2020, "Beyond accuracy: quantifying trial-by-trial behaviour of CNNs and
        humans by measuring error consistency".
    """
    wrong = wrong.astype(np.float64)
    rates = wrong.mean(axis=1)
    both = wrong @ wrong.T / wrong.shape[1]
    chance = np.outer(rates, rates)
    with np.errstate(invalid="ignore"):
        return (both - chance) / (np.minimum.outer(rates, rates) - chance)


def marks(records: Mapping[Path, RunRecord], wrong: Mapping[Path, np.ndarray]) -> dict[Path, str]:
    """Completed runs that no training is known to leave like this, and why, in words for a table.

    Nobody is refused by these rules, for a true record may be the first of its kind.

    Args:
        records: Of one results directory.
        wrong: Of each completed one's test images, which it got wrong: bool (num_test,).
    """
    why: dict[Path, list[str]] = defaultdict(list)
    by_data: dict[str, list[Path]] = defaultdict(list)
    for path in wrong:
        why[path] += _mark_of_speed(records[path])
        by_data[records[path].data_version].append(path)
    for paths in by_data.values():
        for path in paths:
            if copies := [other for other in paths if _is_copied_history(records[path], records[other])]:
                why[path].append(f"its losses are those of {records[copies[0]].name}")
        if len(wrong[paths[0]]) >= FEWEST_IMAGES:
            for path, found in _marks_of_errors(records, {path: wrong[path] for path in paths}).items():
                why[path] += found
    return {path: "; ".join(found) for path, found in why.items() if found}


def _mark_of_speed(record: RunRecord) -> list[str]:
    """Says if training took less time than its arithmetic can on any device."""
    environment = record.environment
    # A weight is multiplied once going forward and once for its gradient, whatever FLOPs the record claims.
    per_image = max(record.flops_per_image, 4 * record.num_trainable_params)
    flops = per_image * record.num_steps * record.batch_size * (record.trained_with + 1)
    if environment.device_platform == "cpu":
        seconds = record.train_seconds * environment.cpu_cores * environment.num_processes
        seconds = min(seconds, record.train_core_seconds)
        peak, of_what = PEAK_CORE_FLOPS.get(record.dtype, max(PEAK_CORE_FLOPS.values())), "core"
    else:
        seconds = record.train_seconds * environment.num_devices
        peak, of_what = PEAK_ACCELERATOR_FLOPS, "device"
    if flops <= peak * seconds:
        return []
    speed = f"{flops / seconds / 1e9:,.0f}" if seconds else "infinitely many"
    return [f"its time asks for {speed} GFLOP/s of a {of_what}, and none does more than {peak / 1e9:,.0f}"]


def _is_copied_history(record: RunRecord, other: RunRecord) -> bool:
    """Whether the losses of the run of another seed are these, to the last bit, over the epochs that both have."""
    pairs = zip(record.history, other.history, strict=False)
    return record.seed != other.seed and all(ours.train_loss == theirs.train_loss for ours, theirs in pairs)


def _marks_of_errors(records: Mapping[Path, RunRecord], wrong: Mapping[Path, np.ndarray]) -> dict[Path, list[str]]:
    """Says whose errors are not a trained net's, or too much another one's."""
    paths = list(wrong)
    shared = shared_errors(np.stack([wrong[path] for path in paths]))
    found = {}
    for index, path in enumerate(paths):
        record = records[path]
        found[path] = [] if wrong[path].any() else [f"it makes no error on {record.num_test:,} images"]
        by_entry: dict[str, list[float]] = defaultdict(list)
        twins = []
        for other, value in zip(paths, shared[index], strict=True):
            if records[other].entry != record.entry and not math.isnan(value):
                by_entry[records[other].entry].append(value)
            if value > MOST_TWINS and not _is_same_net(record, records[other]):
                twins.append((value, records[other].name))
        if len(by_entry) >= FEWEST_ENTRIES:
            median = statistics.median(map(statistics.fmean, by_entry.values()))
            if not LEAST_SHARED <= median <= MOST_SHARED:
                seen = " to ".join(f"{value:.2f}" for value in SEEN_SHARED)
                found[path].append(f"it shares {median:.2f} of its errors with other entries, trained nets {seen}")
        if twins:
            value, name = max(twins)
            found[path].append(f"it shares {value:.2f} of its errors with {name}, two nets at most {SEEN_TWINS}")
    return found


def _is_same_net(record: RunRecord, other: RunRecord) -> bool:
    """Whether both began with the same weights, so that they may well end alike: in another dtype, say."""
    ours, theirs = complete(record.config), complete(other.config)
    keys = {key for key in ours | theirs if key == "seed" or key.startswith("model.")}
    return all(ours.get(key) == theirs.get(key) for key in keys)
