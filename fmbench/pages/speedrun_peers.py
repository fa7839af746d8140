"""What the speed records are held against: vgg_like by its own protocol, and the same recipe in other systems."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fmbench.data import proof
from fmbench.pages import generated
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import median_with_misses
from fmbench.throughput.measurements import (
    YARDSTICK,
    Measurements,
    ModelThroughput,
    Row,
)

CONFIG_FILE = "configs/speedrun.py"

VGG_LIKE_TARGET = 94
VGG_LIKE_PUBLISHED_EPOCHS = 45  # "after 40-45 epochs"
VGG_LIKE_IMAGES = 60_000  # of an epoch

HOW_PEERS_ARE_MEASURED = """\
The same net and batch in fmbench and other systems, in turns in one run on one machine, as
[throughput.md](throughput.md) has it and says what a step contains; the times of a step are medians over the
rounds. Training is the time of a step times the steps of the recipe. The last two columns compare with
fmbench in float32.
"""

NOT_MEASURED = "not measured yet"


class Way(NamedTuple):
    """Of vgg_like to its target."""

    epochs: float
    source: str  # of that number


def vgg_like_way(runs: Iterable[RunRecord]) -> Way:
    """The epochs of vgg_like to its target, by the runs of its whole protocol, on whatever machine."""
    whole = [run for run in runs if run.entry == "vgg_like" and run.data_version == proof.STANDARD]
    if not whole:
        return Way(VGG_LIKE_PUBLISHED_EPOCHS, "published")
    which = f"{len(whole)} run{'s' if len(whole) > 1 else ''} of the whole protocol"
    measured = median_with_misses([epochs_to(VGG_LIKE_TARGET / 100, run) for run in whole])
    if measured is None:
        return Way(VGG_LIKE_PUBLISHED_EPOCHS, f"published; a miss in {which}")
    return Way(measured, f"measured in {which}")


def vgg_like_cost(entries: Sequence[list[RunRecord]], way: Way) -> tuple[float | None, str]:
    """Core-seconds of vgg_like to its target, and where the number comes from.

    Args:
        entries: The runs over seeds of vgg_like, and of the same shortened.
        way: What counts where none of them got there.
    """
    longest_first = sorted(entries, key=lambda runs: -runs[0].num_epochs)
    for runs in longest_first:
        measured = median_with_misses([core_seconds_to(VGG_LIKE_TARGET / 100, run) for run in runs])
        if measured is not None:
            return measured, f"{runs[0].entry} measured here, on the {runs[0].watched} split"
    if not longest_first:
        return None, "no run of vgg_like here"
    runs = longest_first[0]
    of_an_epoch = statistics.median(epoch.train_core_seconds for run in runs for epoch in run.history)
    how = (
        f"vgg_like: {way.epochs:g} epochs ({way.source}) x {of_an_epoch:,.1f}, the measured core-seconds of an "
        f"epoch here ({runs[0].entry})"
    )
    return way.epochs * of_an_epoch, how


def core_seconds_to(target: float, run: RunRecord) -> float | None:
    """Training up to the first end of an epoch at which the watched split reached the target; None if none did."""
    epochs = epochs_to(target, run)
    return None if epochs is None else sum(epoch.train_core_seconds for epoch in run.history[:epochs])


def epochs_to(target: float, run: RunRecord) -> int | None:
    """The first number of epochs after which the watched split reached the target; None if it never did."""
    for number, epoch in enumerate(run.history, start=1):
        accuracy = epoch.test_accuracy if run.watched == "test" else epoch.val_accuracy
        if accuracy is not None and accuracy >= target:
            return number
    return None


def render(measurements: Measurements, completed: Sequence[RunRecord], way: Way) -> list[str]:
    """The paragraphs and tables of what was measured of the speed records' steps.

    Args:
        measurements: Of the steps, in fmbench and elsewhere.
        completed: Runs, which tell how many steps a record has.
        way: Of vgg_like, to be put beside the record of its target.
    """
    parts = [HOW_PEERS_ARE_MEASURED]
    for name, model in sorted(measurements.models.items()):
        if model.config_file == CONFIG_FILE:
            runs = [run for run in completed if (run.entry, run.batch_size) == (name, model.batch_size)]
            num_steps = runs[0].num_steps if runs else None
            steps = f"{num_steps:,} steps" if runs else "not run yet"
            machine = model.conditions.environment
            parts += [
                f"{name}: batch {model.batch_size:,}, {steps}; measured on {generated.text(machine.cpu)} "
                f"({machine.cpu_cores} cores), {model.conditions.created[:10]}.",
                _peers_table(model, num_steps),
            ]
            vgg_like = measurements.models.get("vgg_like")
            if vgg_like and num_steps and name == f"speedrun-{VGG_LIKE_TARGET}":
                parts += _vgg_like(vgg_like, way, model, num_steps)
    return parts if len(parts) > 1 else [*parts, f"{NOT_MEASURED.capitalize()}."]


def _vgg_like(vgg_like: ModelThroughput, way: Way, record: ModelThroughput, num_steps: int) -> list[str]:
    """The way of vgg_like to its target in every system, beside the `num_steps` steps of the record in fmbench."""
    yardstick = record.find(YARDSTICK)
    seconds, core_seconds = _step_cost(record, yardstick) if yardstick else (None, None)
    vgg_like_steps = round(way.epochs * (VGG_LIKE_IMAGES // vgg_like.batch_size))
    rows = [
        "| system | training, s | training, core-seconds | time / the record's | core-seconds / the record's |",
        "|:--|--:|--:|--:|--:|",
    ]
    for row in vgg_like.rows:
        if row.failure is None:
            its_seconds, its_core_seconds = _step_cost(vgg_like, row)
            cells = [
                f"{row.system} {row.dtype}",
                _product(its_seconds, vgg_like_steps, "{:,.0f}"),
                _product(its_core_seconds, vgg_like_steps, "{:,.0f}"),
                _quotient(its_seconds * vgg_like_steps, _times(seconds, num_steps)),
                _quotient(_times(its_core_seconds, vgg_like_steps), _times(core_seconds, num_steps)),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return [
        f"vgg_like by its own protocol: {vgg_like_steps:,} steps of {vgg_like.batch_size:,} images, its "
        f"{way.epochs:g} epochs to {VGG_LIKE_TARGET} % ({way.source}), beside the {num_steps:,} of the record in "
        f"fmbench in float32; measured {vgg_like.conditions.created[:10]}.",
        "\n".join(rows),
    ]


def _peers_table(model: ModelThroughput, num_steps: int | None) -> str:
    rows = [
        "| system | ms a step | core-seconds a step | training, s | training, core-seconds "
        "| time / fmbench's | core-seconds / fmbench's |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    yardstick = model.find(YARDSTICK)
    own_seconds, own_core_seconds = _step_cost(model, yardstick) if yardstick else (None, None)
    for row in model.rows:
        name = f"{row.system} {row.dtype}"
        if row.failure is not None:
            rows.append(f"| {name} | failed: {generated.text(row.failure)} | | | | | |")
            continue
        seconds, core_seconds = _step_cost(model, row)
        cells = [
            f"**{name}**" if row.variant == YARDSTICK else name,
            _product(seconds, 1000, "{:,.1f}"),
            _product(core_seconds, 1, "{:,.3f}"),
            _product(seconds, num_steps, "{:,.1f}"),
            _product(core_seconds, num_steps, "{:,.1f}"),
            _quotient(seconds, own_seconds),
            _quotient(core_seconds, own_core_seconds),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _step_cost(model: ModelThroughput, row: Row) -> tuple[float, float | None]:
    """Seconds and core-seconds of a training step."""
    seconds = model.batch_size / statistics.median(row.train_images_per_sec)
    if not row.train_core_seconds_per_1000:
        return seconds, None
    return seconds, model.batch_size / 1000 * statistics.median(row.train_core_seconds_per_1000)


def _times(number: float | None, factor: int) -> float | None:
    return None if number is None else number * factor


def _product(number: float | None, factor: float | None, form: str) -> str:
    return "-" if number is None or factor is None else form.format(number * factor)


def _quotient(number: float | None, divisor: float | None) -> str:
    return "-" if number is None or not divisor else f"{number / divisor:.2f}x"
