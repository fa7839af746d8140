"""Renders the speed records: results/speedrun.md, and the short table in the README.

python -m fmbench.speedrun            write them
python -m fmbench.speedrun --check    fail if they are not what the records say
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from fmbench import generated, leaderboard, results, throughput
from fmbench.errors import UserError
from fmbench.results import RunRecord
from fmbench.statistics import mean_and_std, median_with_misses
from fmbench.throughput import YARDSTICK, Measurements, ModelThroughput

README_MARKS = ("<!-- speedrun: begin -->", "<!-- speedrun: end -->")
CONFIG_FILE = "configs/speedrun.py"
ENTRY = re.compile(r"speedrun-(\d+)(-tta)?(\+.*)?")

SEEDS_NEEDED = {94: 10}
SEEDS_NEEDED_ELSEWHERE = 5
MOST_95_PER_94 = 6.0  # core-seconds

VGG_LIKE = re.compile(r"vgg_like(\+num_epochs=\d+)?")
VGG_LIKE_TARGET = 94
VGG_LIKE_PUBLISHED_EPOCHS = 45  # "after 40-45 epochs"

HOW_TO_READ = f"""\
`speedrun-94` is the recipe that comes to 94 % with the least training. The rules: the mean test accuracy over
seeds must be at or above the target, after the last epoch, each test image seen once, as it is ("single view").
The test set is to be read once per finished recipe, and recipes are to be tuned on held-out train images. How far
that was kept the log, [docs/speedrun.md](../docs/speedrun.md), tells.

A record "holds" if its mean is at or above the target over at least {SEEDS_NEEDED[94]} seeds for 94 %,
{SEEDS_NEEDED_ELSEWHERE} for the other targets; a mean below the target is a "miss". Test accuracy is
mean ± sample standard deviation over the seeds; the interval is Student's, 95 %, for the mean over seeds. Times
are medians over the seeds (and their range) of the training steps alone, without set-up, compilation, evaluation
and checkpoints; core-seconds are processor time, which a busy machine does not stretch. Compile time is a cold
compile's, or "cached". PFLOP are the FLOPs of an image, as XLA counts them, times the images trained on. Lines
stand in the order of targets and core-seconds. Entries with test-time augmentation (`-tta`) have tables of their
own.
"""

HOW_PEERS_ARE_MEASURED = """\
The same net and batch in fmbench and other systems, in turns in one run on one machine, as
[throughput.md](throughput.md) has it and says what a step contains; the times of a step are medians over the
rounds. Training is the time of a step times the steps of the recipe. The last two columns compare with
fmbench in float32.
"""

NOT_MEASURED = "not measured yet"


class Line(NamedTuple):
    """An entry and its completed runs, in the order of the seeds."""

    target: int  # percent
    test_time_augmentation: bool
    runs: list[RunRecord]

    @property
    def entry(self) -> str:
        return self.runs[0].entry

    @property
    def core_seconds(self) -> float:
        return statistics.median(run.train_core_seconds for run in self.runs)

    @property
    def num_hits(self) -> int:
        """Seeds at or above the target."""
        return sum(_correct(run) * 100 >= self.target * run.num_test for run in self.runs)

    @property
    def misses(self) -> bool:
        """Is the mean below the target? In whole numbers, for a mean may be exactly the target."""
        correct = sum(_correct(run) for run in self.runs)
        return correct * 100 < self.target * sum(run.num_test for run in self.runs)

    @property
    def verdict(self) -> str:
        """'yes', or why the record does not hold."""
        needed = SEEDS_NEEDED.get(self.target, SEEDS_NEEDED_ELSEWHERE)
        if self.misses:
            return "no: **miss**"
        return "yes" if len(self.runs) >= needed else f"no: {len(self.runs)} of {needed} seeds"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmbench.speedrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 on a difference")
    arguments = parser.parse_args()
    try:
        if not arguments.results_dir.is_dir():
            raise UserError(f"--results_dir={arguments.results_dir} is not a directory.")
        records = results.read_all(arguments.results_dir)
        files = render(arguments.results_dir, records, throughput.read(arguments.results_dir))
        stale = generated.stale(files)
        if not arguments.check:
            generated.write(files)
    except OSError as error:
        print(f"fmbench.speedrun: {error.filename}: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"fmbench.speedrun: {error}", file=sys.stderr)
        sys.exit(2)
    names = ", ".join(map(str, files))
    if not arguments.check:
        print(f"{names} written.")
    elif stale:
        for path in stale:
            print(f"{path} is not what the records say; run python -m fmbench.speedrun.", file=sys.stderr)
        sys.exit(1)
    else:
        print(f"The records agree with {names}.")


def render(results_dir: Path, records: dict[Path, RunRecord], measurements: Measurements) -> dict[Path, str]:
    """The generated files and what belongs in them.

    Raises:
        UserError: If runs of different configs claim one line, or the README's marks are not in order.
    """
    page = ["# Time to accuracy", "Generated by `python -m fmbench.speedrun` from `runs/` and `throughput.json`."]
    page.append(HOW_TO_READ)
    summary = []
    conditions = leaderboard.entries_by_condition(records)
    for condition, entries in conditions.items():
        groups = [list(runs.values()) for runs in entries]
        lines = lines_of(groups)
        ranked = [line for line in lines if not line.test_time_augmentation]
        augmented = [line for line in lines if line.test_time_augmentation]
        if lines:
            page.append(f"## {condition.title}")
        if ranked:
            page += [
                _records_table(ranked),
                "### Goals",
                _goals_table(ranked, [runs for runs in groups if VGG_LIKE.fullmatch(runs[0].entry)]),
            ]
            summary.append(f"**{condition.title}**\n\n{_summary_table(ranked)}")
        if augmented:
            page += ["### With test-time augmentation", _records_table(augmented)]
    if not summary:
        summary = ["No records yet."]
        page.append("No records yet.")
    completed = [run for entries in conditions.values() for runs in entries for run in runs.values()]
    if unfinished := [run for run in records.values() if _is_unfinished(run)]:
        page += ["## Not finished", leaderboard.markdown_unfinished(unfinished)]
    page += ["## The same recipe in other systems", HOW_PEERS_ARE_MEASURED, *_peers(measurements, completed)]
    files = {results_dir / "speedrun.md": "\n\n".join(part.strip() for part in page) + "\n"}
    return files | generated.between_marks(results_dir.parent / "README.md", README_MARKS, summary)


def lines_of(entries: Sequence[list[RunRecord]]) -> list[Line]:
    """The speed records among the entries of a condition, in the order of targets and core-seconds."""
    lines = [
        Line(int(match[1]), match[2] is not None, runs)
        for runs in entries
        if (match := ENTRY.fullmatch(runs[0].entry))
    ]
    return sorted(lines, key=lambda line: (line.target, line.core_seconds, line.entry))


def _is_unfinished(run: RunRecord) -> bool:
    is_speedrun = ENTRY.fullmatch(run.entry) is not None
    return is_speedrun and run.status != "completed" and run.data_version != "sample"


def _correct(run: RunRecord) -> int:
    """Test images that were classified rightly."""
    return round((run.test_accuracy or 0) * run.num_test)


# The records.


def _records_table(lines: Sequence[Line]) -> str:
    rows = [
        "| entry | target, % | seeds | test accuracy, % | interval, % | seeds at target | holds | train time, s "
        "| core-seconds | compile, s | epochs | params | PFLOP | commit | jax |",
        "|:--|--:|--:|--:|--:|--:|:--|--:|--:|--:|--:|--:|--:|:--|:--|",
    ]
    for line in lines:
        first = line.runs[0]
        cells = [
            f"[{line.entry}](../{first.config_file})",
            str(line.target),
            str(len(line.runs)),
            _accuracy_text(line.runs),
            _interval_text(line.runs),
            f"{line.num_hits} of {len(line.runs)}",
            line.verdict,
            _spread([run.train_seconds for run in line.runs]),
            _spread([run.train_core_seconds for run in line.runs]),
            leaderboard.compile_text(line.runs),
            str(first.num_epochs),
            f"{first.num_params:,}",
            f"{statistics.median(_flops(run) for run in line.runs) / 1e15:.3g}",
            _distinct(_commit(run) for run in line.runs),
            _distinct(run.environment.versions["jax"] for run in line.runs),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _summary_table(lines: Sequence[Line]) -> str:
    """The README's."""
    rows = [
        "| target, % | entry | test accuracy, % | holds | train time, s | core-seconds | epochs | params |",
        "|--:|:--|--:|:--|--:|--:|--:|--:|",
    ]
    for line in lines:
        first = line.runs[0]
        cells = [
            str(line.target),
            f"[{line.entry}]({first.config_file})",
            f"{_accuracy_text(line.runs)} ({len(line.runs)})",
            line.verdict,
            f"{statistics.median(run.train_seconds for run in line.runs):,.1f}",
            f"{line.core_seconds:,.1f}",
            str(first.num_epochs),
            f"{first.num_params:,}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _accuracies(runs: Sequence[RunRecord]) -> list[float]:
    """In percent."""
    return [100 * (run.test_accuracy or 0) for run in runs]


def _accuracy_text(runs: Sequence[RunRecord]) -> str:
    mean, std = mean_and_std(_accuracies(runs))
    # The digits that a mean over ten seeds has: none just below its target shall seem to be on it.
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def _interval_text(runs: Sequence[RunRecord]) -> str:
    interval = confidence_interval(_accuracies(runs))
    return "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval for the mean, which a single value doesn't give."""
    mean, std = mean_and_std(values)
    if std is None:
        return None
    margin = float(stats.t(df=len(values) - 1).ppf(0.975)) * std / math.sqrt(len(values))
    return mean - margin, mean + margin


def _flops(run: RunRecord) -> float:
    """Of the whole training."""
    return run.flops_per_image * run.batch_size * run.num_steps


def _commit(run: RunRecord) -> str:
    if run.environment.git_commit is None:
        return "none"
    commit = run.environment.git_commit[:7]
    return commit if run.environment.git_dirty is False else f"{commit} (dirty)"


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _spread(seconds: Sequence[float]) -> str:
    median = f"{statistics.median(seconds):,.1f}"
    return median if len(seconds) == 1 else f"{median} ({min(seconds):,.1f}-{max(seconds):,.1f})"


# The goals.


def _goals_table(lines: Sequence[Line], vgg_like: Sequence[list[RunRecord]]) -> str:
    found = {line.entry: line for line in lines}
    at_94, at_95 = found.get("speedrun-94"), found.get("speedrun-95")
    cost_94 = at_94.core_seconds if at_94 else None
    cost_95 = at_95.core_seconds if at_95 else None
    cost_vgg_like, how = vgg_like_cost(vgg_like)
    goal_95 = f"at most {MOST_95_PER_94:g}x"
    if at_94 and at_95 and at_94.verdict == at_95.verdict == "yes":
        goal_95 += ": met" if at_95.core_seconds <= MOST_95_PER_94 * at_94.core_seconds else ": **missed**"
    rows = [
        "| core-seconds of | | ratio | goal | |",
        "|:--|--:|--:|:--|:--|",
        _goal_row(f"vgg_like to {VGG_LIKE_TARGET} % / speedrun-94", cost_vgg_like, cost_94, "-", how, at_94),
        _goal_row("speedrun-95 / speedrun-94", cost_95, cost_94, goal_95, "", at_94, at_95),
    ]
    return "\n".join(rows)


def _goal_row(
    what: str, cost: float | None, divisor: float | None, goal: str, remark: str, *lines: Line | None
) -> str:
    remarks = [remark] if remark else []
    remarks += [f"{line.entry} does not hold" for line in lines if line and line.verdict != "yes"]
    costs, ratio = NOT_MEASURED, "-"
    if cost is not None and divisor is not None:
        costs, ratio = f"{cost:,.1f} / {divisor:,.1f}", f"{cost / divisor:.1f}x"
    return f"| {what} | {costs} | {ratio} | {goal} | {'; '.join(remarks)} |"


def vgg_like_cost(entries: Sequence[list[RunRecord]]) -> tuple[float | None, str]:
    """Core-seconds of vgg_like to its target, and where the number comes from.

    Args:
        entries: The runs over seeds of vgg_like, and of the same shortened.
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
        f"vgg_like: published {VGG_LIKE_PUBLISHED_EPOCHS} epochs x {of_an_epoch:,.1f}, the measured core-seconds "
        f"of an epoch here ({runs[0].entry})"
    )
    return VGG_LIKE_PUBLISHED_EPOCHS * of_an_epoch, how


def core_seconds_to(target: float, run: RunRecord) -> float | None:
    """Training up to the first end of an epoch at which the watched split reached the target; None if none did."""
    spent = 0.0
    for epoch in run.history:
        spent += epoch.train_core_seconds
        accuracy = epoch.test_accuracy if run.watched == "test" else epoch.val_accuracy
        if accuracy is not None and accuracy >= target:
            return spent
    return None


# Other systems.


def _peers(measurements: Measurements, completed: Sequence[RunRecord]) -> list[str]:
    parts = []
    for name, model in sorted(measurements.models.items()):
        if model.config_file == CONFIG_FILE:
            runs = [run for run in completed if (run.entry, run.batch_size) == (name, model.batch_size)]
            num_steps = runs[0].num_steps if runs else None
            steps = f"{num_steps:,} steps" if runs else "not run yet"
            machine = model.conditions.environment
            parts += [
                f"{name}: batch {model.batch_size:,}, {steps}; measured on {machine.cpu} ({machine.cpu_cores} "
                f"cores), {model.conditions.created[:10]}.",
                _peers_table(model, num_steps),
            ]
    return parts or [f"{NOT_MEASURED.capitalize()}."]


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
            reason = row.failure.replace("|", "\\|")  # which would end the cell
            rows.append(f"| {name} | failed: {reason} | | | | | |")
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


def _step_cost(model: ModelThroughput, row: throughput.Row) -> tuple[float, float | None]:
    """Seconds and core-seconds of a training step."""
    seconds = model.batch_size / statistics.median(row.train_images_per_sec)
    if not row.train_core_seconds_per_1000:
        return seconds, None
    return seconds, model.batch_size / 1000 * statistics.median(row.train_core_seconds_per_1000)


def _product(number: float | None, factor: float | None, form: str) -> str:
    return "-" if number is None or factor is None else form.format(number * factor)


def _quotient(number: float | None, divisor: float | None) -> str:
    return "-" if number is None or not divisor else f"{number / divisor:.2f}x"


if __name__ == "__main__":
    main()
