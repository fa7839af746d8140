"""Renders the speed records: results/speedrun.md, and the table at the top of the README.

python -m fmbench.speedrun            write them
python -m fmbench.speedrun --check    fail if they are not what the records say
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from fmbench import entries
from fmbench.errors import UserError
from fmbench.pages import generated, leaderboard, speedrun_peers
from fmbench.pages.leaderboard import Condition
from fmbench.pages.speedrun_peers import CONFIG_FILE, NOT_MEASURED, VGG_LIKE, VGG_LIKE_TARGET, Way
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import mean_and_std
from fmbench.throughput.measurements import Measurements, read_measurements

README_MARKS = ("<!-- records: begin -->", "<!-- records: end -->")
README_ROWS = 8
ENTRY = re.compile(r"speedrun-(\d+)(-gpu)?(\+.*)?")

LEVEL = 0.01  # of the test that a record must pass
SEEDS_NEEDED = {94: 10}
SEEDS_NEEDED_ELSEWHERE = 5
NEEDS_AN_ACCELERATOR = "speedrun-96"
PREDICTED_PFLOP_96 = 375  # of a seed's training, as XLA counts them
H100_FLOPS = 989e12  # per second: its peak, bfloat16, dense
LEAST_VGG_LIKE_PER_94, MOST_95_PER_94 = 30.0, 6.0  # core-seconds

# The recipes for the same target whose test accuracy was seen before the entry's, each a chance to hold by luck.
TRIED_BEFORE_94 = (
    "the net without a stem, 9 epochs: 94.00 and 93.92, a miss, for which it got more epochs",
    "the same, 12 epochs: 94.229 ± 0.160 (10), the record until commit 4eb145c",
)
TRIED_BEFORE = {
    "speedrun-93": (),
    "speedrun-94": TRIED_BEFORE_94,
    "speedrun-94-gpu": (*TRIED_BEFORE_94, "speedrun-94"),
    "speedrun-95": (
        "a net twice as wide as the first one for 94 %, 18 epochs, 50,000 images: 94.64, seen by mistake",
        "three such nets that answer together, 12 epochs: 94.83, a miss (commit 8899e6c)",
        "a net half again as wide with a stem of 16 channels, 12 epochs: 94.990 (5), a miss (commit d2d0412)",
    ),
}

HOW_TO_READ = f"""\
`speedrun-94` is the recipe that comes to 94 % with the least training. The rules: the mean test accuracy of the
recipe must be above the target, after the last epoch, each test image seen once, as it is ("single view"). The
test set is to be read once per finished recipe, and recipes are to be tuned on held-out train images. How far
that was kept the log, [docs/speedrun.md](../docs/speedrun.md), tells; why the rules are what they are,
[docs/measuring.md](../docs/measuring.md).

A record "holds" if "the mean is at or below the target" has p < {LEVEL:g} in a one-sided t-test over
{SEEDS_NEEDED[94]} seeds for 94 %, {SEEDS_NEEDED_ELSEWHERE} for the other targets; a mean below the target is a
"miss". Seeds follow from the recipe (`python -m fmbench.speedrun --seeds=speedrun:94`), so that nobody can choose
them. A line marked † has others: 0 and up were what records had before there was this rule. "Tried" counts the
recipes for the same target that met the test set before this one; with k of them the chance that any passes by
luck is up to {LEVEL:g} (k + 1).

Test accuracy is mean ± sample standard deviation over the seeds; the interval is Student's, 95 %, for the mean
over seeds. Times are medians over the seeds (and their range) of the training steps alone, without set-up,
compilation, evaluation and checkpoints; core-seconds are processor time, which a busy machine stretches less than
wall seconds, but does. Compile time is a cold compile's, or "cached". Where n seeds were trained at once, in one
program, times are those of all n together, and the README leaves them out. Runs that shared the cores of a machine
are no timings, and not here. PFLOP are the FLOPs of an image, as XLA counts them, times the images trained on.
Lines stand in the order of targets and core-seconds.
"""


class Line(NamedTuple):
    """An entry and its completed runs, in the order of the seeds."""

    target: int  # percent
    runs: list[RunRecord]

    @property
    def entry(self) -> str:
        return self.runs[0].entry

    @property
    def train_seconds(self) -> float:
        return statistics.median(run.train_seconds for run in self.runs)

    @property
    def core_seconds(self) -> float:
        return statistics.median(run.train_core_seconds for run in self.runs)

    @property
    def num_hits(self) -> int:
        """Seeds at or above the target."""
        return sum(_correct(run) * 100 >= self.target * run.num_test for run in self.runs)

    @property
    def p_value(self) -> float | None:
        # Of whole numbers, for equal accuracies must have no spread.
        return p_value([_correct(run) for run in self.runs], self.target * self.runs[0].num_test / 100)

    @property
    def misses(self) -> bool:
        """Is the mean below the target? In whole numbers, for a mean may be exactly the target."""
        correct = sum(_correct(run) for run in self.runs)
        return correct * 100 < self.target * sum(run.num_test for run in self.runs)

    @property
    def verdict(self) -> str:
        """'yes', or why the record does not hold."""
        needed = seeds_needed(self.target)
        if self.misses:
            return "no: **miss**"
        if len(self.runs) < needed:
            return f"no: {len(self.runs)} of {needed} seeds"
        if self.p_value is None:
            return "no: seeds that do not differ"
        return "yes" if self.p_value < LEVEL else f"no: p = {_p_text(self.p_value)}"

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def has_rule_seeds(self) -> bool:
        return set(self.seeds) == set(rule_seeds(self.runs[0].config))


def seeds_needed(target: int) -> int:
    return SEEDS_NEEDED.get(target, SEEDS_NEEDED_ELSEWHERE)


def rule_seeds(recipe: Mapping[str, Any]) -> list[int]:
    """The seeds that a record of this config, nested as records have it, is to have.

    Raises:
        UserError: If it is no speed record's.
    """
    match = ENTRY.fullmatch(recipe["entry"])
    if not match:
        raise UserError(f"'{recipe['entry']}' has no seeds by rule: speed records do, as in --seeds=speedrun:94.")
    return entries.seeds_of(recipe, seeds_needed(int(match[1])))


def p_value(values: Sequence[float], target: float) -> float | None:
    """Of "the mean is at or below the target": Student's t, one-sided; None where there is no spread to go by."""
    mean, std = mean_and_std(values)
    if not std:
        return None
    return float(stats.t(df=len(values) - 1).sf((mean - target) * math.sqrt(len(values)) / std))


def files(results_dir: Path) -> dict[Path, str]:
    return render(results_dir, store.read_all(results_dir), read_measurements(results_dir))


def render(results_dir: Path, records: dict[Path, RunRecord], measurements: Measurements) -> dict[Path, str]:
    """The generated files and what belongs in them.

    Raises:
        UserError: If runs of different configs claim one line, or the README's marks are not in order.
    """
    page = [
        "# Time to accuracy",
        "Generated by `python -m fmbench.speedrun` from `runs/` and `throughput.json`.",
    ]
    page.append(HOW_TO_READ)
    of_all: list[tuple[Condition, Line]] = []
    conditions = leaderboard.entries_by_condition(
        {path: record for path, record in records.items() if record.environment.shared_by is None}
    )
    completed = [
        run for by_seed in conditions.values() for runs in by_seed for run in runs.values() if not run.trained_with
    ]
    for condition, by_seed in conditions.items():
        groups = [list(runs.values()) for runs in by_seed]
        lines = lines_of(groups)
        if lines:
            page += [f"## {generated.text(condition.title)}", _records_table(lines), *_other_seeds(lines)]
        if lines and not condition.trained_with:
            here = [run for runs in groups for run in runs if VGG_LIKE.fullmatch(run.entry)]
            way = speedrun_peers.vgg_like_way(completed, condition.dtype)
            page += ["### Goals", _goals_table(lines, here, way)]
            of_all += [(condition, line) for line in lines]
    page += ["## Tried on the test set before", _tried_text()]
    if not of_all:
        page.append("No records yet.")
    if all(run.entry != NEEDS_AN_ACCELERATOR for run in completed):
        minutes = PREDICTED_PFLOP_96 * 1e15 / (H100_FLOPS / 3) / 60
        page.append(
            f"[{NEEDS_AN_ACCELERATOR}](../{CONFIG_FILE}): not run here, needs an accelerator. **Predicted**, not "
            f"measured: {PREDICTED_PFLOP_96} PFLOP a seed, {minutes:.0f} minutes on an H100 at a third of its "
            f"{H100_FLOPS / 1e12:.0f} TFLOP/s ([how](../docs/speedrun.md))."
        )
    if unfinished := [run for run in records.values() if _is_unfinished(run)]:
        page += ["## Not finished", leaderboard.markdown_unfinished(unfinished)]
    page += ["## The same recipe in other systems", *speedrun_peers.render(measurements, completed)]
    files = {results_dir / "speedrun.md": "\n\n".join(part.strip() for part in page) + "\n"}
    return files | generated.between_marks(results_dir.parent / "README.md", README_MARKS, [_readme_table(of_all)])


def lines_of(entries: Sequence[list[RunRecord]]) -> list[Line]:
    """The speed records among the entries of a condition, in the order of targets and core-seconds.

    Where all seeds of the rule are there, they alone count.
    """
    lines = []
    for runs in entries:
        if match := ENTRY.fullmatch(runs[0].entry):
            rule = rule_seeds(runs[0].config)
            by_rule = [run for run in runs if run.seed in rule]
            lines.append(Line(int(match[1]), by_rule if len(by_rule) == len(rule) else runs))
    return sorted(lines, key=lambda line: (line.target, line.core_seconds, line.entry))


def _is_unfinished(run: RunRecord) -> bool:
    is_speedrun = ENTRY.fullmatch(run.entry) is not None
    return is_speedrun and run.status != "completed" and leaderboard.is_ranked(run)


def _correct(run: RunRecord) -> int:
    """Test images that were classified rightly."""
    return round((run.test_accuracy or 0) * run.num_test)


# The records.


def _records_table(lines: Sequence[Line]) -> str:
    rows = [
        "| entry | target, % | seeds | test accuracy, % | interval, % | p | seeds at target | holds | tried "
        "| train time, s | core-seconds | compile, s | epochs | params | PFLOP | commit | jax |",
        "|:--|--:|--:|--:|--:|--:|--:|:--|--:|--:|--:|--:|--:|--:|--:|:--|:--|",
    ]
    for line in lines:
        first = line.runs[0]
        cells = [
            generated.link(line.entry, first.config_file, "../"),
            str(line.target),
            str(len(line.runs)) + ("" if line.has_rule_seeds else " †"),
            _accuracy_text(line.runs),
            _interval_text(line.runs),
            _p_text(line.p_value),
            f"{line.num_hits} of {len(line.runs)}",
            line.verdict,
            str(len(TRIED_BEFORE[line.entry])) if line.entry in TRIED_BEFORE else "-",
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


def _other_seeds(lines: Sequence[Line]) -> list[str]:
    """A paragraph that names seeds which are not the rule's; none, if there are none."""
    others = [f"{line.entry} {_seeds_text(line.seeds)}" for line in lines if not line.has_rule_seeds]
    return [f"† Seeds that are not the rule's: {'; '.join(others)}."] if others else []


def _seeds_text(seeds: Sequence[int]) -> str:
    """'0 to 9', or '3, 7' where some are left out between."""
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _tried_text() -> str:
    lines = [
        f"- {entry}: {len(recipes)}{': ' if recipes else ''}{'; '.join(recipes)}."
        for entry, recipes in TRIED_BEFORE.items()
    ]
    return "\n".join(lines)


def _readme_table(lines: Sequence[tuple[Condition, Line]]) -> str:
    """Of each target the fastest record on CPUs, and on accelerators; one that holds before any that does not."""
    best: dict[tuple[int, bool], tuple[Condition, Line]] = {}
    for condition, line in sorted(lines, key=lambda one: (one[1].verdict != "yes", one[1].train_seconds)):
        is_cpu = line.runs[0].environment.device_platform == "cpu"
        best.setdefault((line.target, is_cpu), (condition, line))
    if not best:
        return "No records yet."
    rows = [
        "| target, % (holds) | recipe | test accuracy, % (seeds) | training, s (core-seconds) | on |",
        "|:--|:--|--:|--:|:--|",
    ]
    for _, (condition, line) in sorted(best.items())[:README_ROWS]:
        cells = [
            f"{line.target} ({line.verdict})",
            generated.link(line.entry, line.runs[0].config_file, ""),
            f"{_accuracy_text(line.runs)} ({len(line.runs)})",
            f"{line.train_seconds:,.1f} ({line.core_seconds:,.1f})",
            generated.text(f"{condition.num_devices} x {condition.device}, {condition.dtype}"),
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


def _p_text(p_value: float | None) -> str:
    if p_value is None:
        return "-"
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.2g}"


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
    environment = run.environment
    if environment.git_commit is None:
        return f"not known ({environment.git_unknown})" if environment.git_unknown else "not known"
    changed = {False: "", True: " (dirty)", None: " (changes not known)"}
    return environment.git_commit[:7] + changed[environment.git_dirty]


def _distinct(texts: Iterable[str]) -> str:
    return generated.text(", ".join(dict.fromkeys(texts)))


def _spread(seconds: Sequence[float]) -> str:
    median = f"{statistics.median(seconds):,.1f}"
    return median if len(seconds) == 1 else f"{median} ({min(seconds):,.1f}-{max(seconds):,.1f})"


# The goals.


def _goals_table(lines: Sequence[Line], vgg_like: Sequence[RunRecord], way: Way | None) -> str:
    found = {line.entry: line for line in lines}
    at_94, at_95 = found.get("speedrun-94"), found.get("speedrun-95")
    goal_94, goal_95 = f"at least {LEAST_VGG_LIKE_PER_94:g}x", f"at most {MOST_95_PER_94:g}x"
    cost, how = speedrun_peers.vgg_like_cost(vgg_like, way)
    if at_94 and at_94.verdict == "yes":
        if cost is not None and way is not None and way.is_shown:
            is_enough = cost >= LEAST_VGG_LIKE_PER_94 * at_94.core_seconds
            if is_enough or not way.is_bound:
                goal_94 += _met(is_enough)
        if at_95 and at_95.verdict == "yes":
            goal_95 += _met(at_95.core_seconds <= MOST_95_PER_94 * at_94.core_seconds)
    bound = "> " if way and way.is_bound else ""
    rows = [
        "| core-seconds of | | ratio | goal | |",
        "|:--|--:|--:|:--|:--|",
        _goal_row(f"vgg_like to {VGG_LIKE_TARGET} % / speedrun-94", cost, at_94, goal_94, how, [at_94], bound),
        _goal_row(
            "speedrun-95 / speedrun-94", at_95.core_seconds if at_95 else None, at_94, goal_95, "", [at_94, at_95]
        ),
    ]
    return "\n".join(rows)


def _met(is_met: bool) -> str:
    return ": met" if is_met else ": **missed**"


def _goal_row(
    what: str,
    cost: float | None,
    divisor: Line | None,
    goal: str,
    remark: str,
    lines: Sequence[Line | None],
    bound: str = "",
) -> str:
    remarks = [remark] if remark else []
    remarks += [f"{line.entry} does not hold" for line in lines if line and line.verdict != "yes"]
    costs, ratio = NOT_MEASURED, "-"
    if cost is not None and divisor is not None:
        costs = f"{bound}{cost:,.1f} / {divisor.core_seconds:,.1f}"
        ratio = f"{bound}{cost / divisor.core_seconds:.1f}x"
    return f"| {what} | {costs} | {ratio} | {goal} | {'; '.join(remarks)} |"
