"""What the speed records are held against: vgg_like by its own protocol, and the same recipe in other systems."""

import re
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fmbench import entries
from fmbench.data import proof
from fmbench.pages import generated
from fmbench.records.schema import RunRecord
from fmbench.throughput.measurements import (
    YARDSTICK,
    Measurements,
    ModelThroughput,
    Row,
)

CONFIG_FILE = "configs/speedrun.py"

VGG_LIKE = re.compile(r"vgg_like(\+num_epochs=\d+)?")
VGG_LIKE_TARGET = 94
VGG_LIKE_SEEDS = 3  # that its mean needs
VGG_LIKE_IMAGES = 60_000  # of an epoch

HOW_PEERS_ARE_MEASURED = """\
The same net and batch in fmbench and other systems, in turns in one run on one machine, as
[throughput.md](throughput.md) has it and says what a step contains; the times of a step are medians over the
rounds. Training is the time of a step times the steps of the recipe. The last two columns compare with
fmbench in float32.
"""

NOT_MEASURED = "not measured yet"


class Way(NamedTuple):
    """Of vgg_like to its target, by the rule of the records: the mean over seeds after the last epoch."""

    epochs: int
    is_shown: bool  # by seeds enough; otherwise these are the epochs of its protocol, whatever they lead to
    is_bound: bool  # it takes more than that
    source: str


def vgg_like_way(runs: Iterable[RunRecord], dtype: str) -> Way | None:
    """The epochs of vgg_like to its target, by runs in that dtype on any machine; None without a whole run."""
    accuracies: dict[int, dict[int, float]] = {}  # of epochs: of seeds
    for run in runs:
        if VGG_LIKE.fullmatch(run.entry) and (run.dtype, run.data_version) == (dtype, proof.STANDARD):
            accuracies.setdefault(run.num_epochs, {})[run.seed] = run.test_accuracy or 0
    whole = entries.load("vgg_like").num_epochs
    for epochs, by_seed in sorted(accuracies.items()):
        num_seeds, mean = len(by_seed), statistics.mean(by_seed.values())
        if num_seeds >= VGG_LIKE_SEEDS and mean >= VGG_LIKE_TARGET / 100:
            return Way(epochs, True, False, f"after which {num_seeds} seeds have {100 * mean:.2f} % in the mean")
        if epochs == whole:
            source = f"all of its protocol, after which {num_seeds} seed{'s have' if num_seeds > 1 else ' has'} "
            source += f"{100 * mean:.2f} %" + (" in the mean" if num_seeds > 1 else "")
            if num_seeds >= VGG_LIKE_SEEDS:
                return Way(epochs, True, True, source)
            return Way(epochs, False, False, f"{source}; the rule asks for {VGG_LIKE_SEEDS}")
    return None


def vgg_like_cost(here: Sequence[RunRecord], way: Way | None) -> tuple[float | None, str]:
    """Core-seconds of vgg_like's way where `here` ran, and where the number comes from.

    Args:
        here: Runs of vgg_like, whole or shortened, which tell what an epoch costs.
        way: How many epochs it needs.
    """
    if way is None:
        return None, "no run of vgg_like's whole protocol in this dtype"
    if not here:
        return None, "no run of vgg_like here"
    of_an_epoch = statistics.median(epoch.train_core_seconds for run in here for epoch in run.history)
    how = f"vgg_like: {way.epochs} epochs, {way.source}; x {of_an_epoch:,.1f}, the core-seconds of an epoch here"
    return way.epochs * of_an_epoch, how


def render(measurements: Measurements, completed: Sequence[RunRecord]) -> list[str]:
    """The paragraphs and tables of what was measured of the speed records' steps.

    Args:
        measurements: Of the steps, in fmbench and elsewhere.
        completed: Runs, which tell how many steps a record has.
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
                parts += _vgg_like(vgg_like, model, num_steps)
    return parts if len(parts) > 1 else [*parts, f"{NOT_MEASURED.capitalize()}."]


def _vgg_like(vgg_like: ModelThroughput, record: ModelThroughput, num_steps: int) -> list[str]:
    """The whole protocol of vgg_like in every system, beside the `num_steps` steps of the record in fmbench."""
    yardstick = record.find(YARDSTICK)
    seconds, core_seconds = _step_cost(record, yardstick) if yardstick else (None, None)
    epochs = entries.load("vgg_like").num_epochs
    vgg_like_steps = epochs * (VGG_LIKE_IMAGES // vgg_like.batch_size)
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
        f"vgg_like by its own protocol: {vgg_like_steps:,} steps of {vgg_like.batch_size:,} images, all of its "
        f"{epochs} epochs, whether they lead to {VGG_LIKE_TARGET} % or not, beside the {num_steps:,} of the "
        f"record in fmbench in float32; measured {vgg_like.conditions.created[:10]}.",
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
            rows.append(f"| {name} | {generated.text(row.failure)} | | | | | |")
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
