"""Says how much better entries are than a reference, and whether that is more than luck.

    python -m fmbench.compare speedrun-94 speedrun-95 --dtype=float32
    python -m fmbench.compare mlp cnn1 cnn2 --format=csv --figure=curves.pdf

Takes the completed records of the entries in <results_dir>/runs that were made under one condition: data, device,
number of devices, dtype. Prints the difference of the mean test accuracies, each other entry minus A, with its
95 % interval and p-value, by a test in which seeds and test images are both chance. With several others the
p-values are Holm's over these pairs, which the output says; the intervals are each pair's own. The ranks of the
leaderboard are corrected for all pairs of a table.

--figure draws the learning curves over each other, as wide as a column of a paper, readable in grey: mean and
standard deviation over the seeds of training loss and of the accuracy that was watched.

Exit codes: 0 done, 2 something given cannot be used, a single seed included: no test can be made of it.
"""

import argparse
import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbench.errors import UserError, nearest
from fmbench.pages import generated, leaderboard
from fmbench.pages.leaderboard import Condition
from fmbench.records import store
from fmbench.records.schema import Epoch, RunRecord
from fmbench.records.statistics import Difference, holm, mean_and_std, recipe_difference
from fmbench.system import command_line

Entries = dict[str, dict[Path, RunRecord]]  # by name, the runs in the order of their seeds


class Side(NamedTuple):
    """An entry's runs."""

    entry: str
    seeds: list[int]
    correct: np.ndarray  # bool (seeds, num_test)
    histories: list[list[Epoch]]  # of the seeds

    @property
    def mean_and_std(self) -> tuple[float, float]:
        """Of the test accuracies, in percent."""
        mean, std = mean_and_std(self.correct.mean(axis=1).tolist())
        assert std is not None  # there are several seeds
        return 100 * mean, 100 * std


class Pair(NamedTuple):
    """An entry held against the reference; its p-value is corrected for all pairs."""

    other: Side
    difference: Difference  # other minus reference


class Comparison(NamedTuple):
    """Entries under one condition."""

    condition: Condition
    reference: Side
    pairs: list[Pair]


@command_line.plain_errors("compare")
def main() -> None:
    parser = command_line.Parser("compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="an entry, as the leaderboard calls it: the reference")
    parser.add_argument("others", metavar="B", nargs="+", help="another; several are held against A one by one")
    parser.add_argument("--dtype", help="of the runs, where the entries have several")
    parser.add_argument("--condition", default="", help="a part of its title, where they share several")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="learning curves: .svg, .png or .pdf")
    arguments = parser.parse_args()
    if arguments.figure:
        with command_line.needs_extra("figures"):
            from fmbench.pages import drawing
        drawing.check_ending("--figure", arguments.figure)
    comparison = _compare(arguments)
    print(FORMATS[arguments.format](comparison))
    if arguments.figure:
        sides = [comparison.reference, *(pair.other for pair in comparison.pairs)]
        drawing.save(drawing.overlaid_curves({side.entry: side.histories for side in sides}), arguments.figure)


def _compare(arguments: argparse.Namespace) -> Comparison:
    names = [arguments.a, *arguments.others]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is compared with itself; name two entries.")
    conditions = _conditions(arguments.results_dir)
    known = {entry for entries in conditions.values() for entry in entries}
    for entry in names:
        if entry not in known:
            raise UserError(f"{arguments.results_dir} has no completed run of {entry}{nearest(entry, known)}.")
    condition = _the_condition(conditions, names, arguments)
    reference, *others = [_side(entry, conditions[condition][entry]) for entry in names]
    if single := [side.entry for side in (reference, *others) if len(side.seeds) == 1]:
        raise UserError(
            f"no test is possible: {' and '.join(single)} {'have' if single[1:] else 'has'} a single seed (n = 1) "
            f"on {condition.title}, which does not say how much a recipe varies; run more seeds."
        )
    differences = [recipe_difference(reference.correct, other.correct) for other in others]
    p_values = holm([difference.p_value for difference in differences])
    pairs = [
        Pair(other, difference._replace(p_value=p))
        for other, difference, p in zip(others, differences, p_values, strict=True)
    ]
    return Comparison(condition, reference, pairs)


def _side(entry: str, runs: dict[Path, RunRecord]) -> Side:
    histories = [run.history for run in runs.values()]
    return Side(entry, [run.seed for run in runs.values()], leaderboard.correct(runs), histories)


def _conditions(results_dir: Path) -> dict[Condition, Entries]:
    if not results_dir.is_dir():
        raise UserError(f"--results_dir={results_dir} is not a directory.")
    by_condition = leaderboard.entries_by_condition(store.read_all(results_dir))
    return {
        condition: {next(iter(runs.values())).entry: runs for runs in entries}
        for condition, entries in by_condition.items()
    }


def _the_condition(
    conditions: dict[Condition, Entries], names: list[str], arguments: argparse.Namespace
) -> Condition:
    """The one under which all entries were run, and which the flags admit."""
    shared = [condition for condition, entries in conditions.items() if entries.keys() >= set(names)]
    if not shared:
        having = {entry: [c for c, entries in conditions.items() if entry in entries] for entry in names}
        raise UserError(
            "they were not run under one condition: "
            + ", ".join(f"{entry} on {_titles(found)}" for entry, found in having.items())
            + "; runs of different conditions are not compared."
        )
    admitted = [
        condition
        for condition in shared
        if arguments.dtype in (None, condition.dtype) and arguments.condition in condition.title
    ]
    if len(admitted) != 1:
        all_of_them = "all" if names[2:] else "both"
        raise UserError(
            f"{all_of_them} were run on {_titles(admitted or shared)}; choose one of these with --dtype or "
            "--condition."
        )
    return admitted[0]


def _titles(conditions: Iterable[Condition]) -> str:
    return " and on ".join(condition.title for condition in conditions)


def _text(comparison: Comparison) -> str:
    condition, reference, pairs = comparison
    lines = [
        f"{other.entry} minus {reference.entry}: {_points(difference.mean)} points, 95 % interval "
        f"{_points(difference.low)} to {_points(difference.high)}, {_p(difference.p_value)}"
        for other, difference in pairs
    ]
    for side in (reference, *(pair.other for pair in pairs)):
        mean, std = side.mean_and_std
        seeds = ", ".join(map(str, side.seeds))
        lines.append(f"{side.entry}: mean {mean:.2f} %, std {std:.2f}, n = {len(side.seeds)} (seeds {seeds})")
    lines += [_correction(comparison)] if pairs[1:] else []
    lines.append(f"on {condition.title}; the same {reference.correct.shape[1]:,} test images")
    return "\n".join(lines)


def _correction(comparison: Comparison) -> str:
    return f"p-values by Holm over the {len(comparison.pairs)} pairs; each interval is for its pair alone"


def _note(comparison: Comparison) -> str:
    correction = f" {_correction(comparison)}." if comparison.pairs[1:] else ""
    return f"{comparison.condition.title}; {NOTE}{correction}"


def _markdown(comparison: Comparison) -> str:
    head, *rows = _table(comparison)
    rule = "|:--|--:|:--|--:|--:|--:|--:|"
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:], "", _note(comparison)])


def _latex(comparison: Comparison) -> str:
    head, *rows = [[_escaped(cell) for cell in cells] for cells in _table(comparison)]
    return "\n".join(
        [
            "% " + _note(comparison).replace("±", "+-"),
            r"\begin{tabular}{lrlrrrr}",
            r"\hline",
            " & ".join(head) + r" \\",
            r"\hline",
            *(" & ".join(cells) + r" \\" for cells in rows),
            r"\hline",
            r"\end{tabular}",
        ]
    )


def _csv(comparison: Comparison) -> str:
    """A row for each pair, with all digits; accuracies and differences are fractions."""
    condition, reference, pairs = comparison
    rows: list[dict[str, str | float | int]] = []
    for other, difference in pairs:
        row: dict[str, str | float | int] = {}
        for name, side in (("a", reference), ("b", other)):
            mean, std = mean_and_std(side.correct.mean(axis=1).tolist())
            row |= {name: side.entry, f"accuracy_{name}": mean, f"std_{name}": std or 0.0}
            row |= {f"n_{name}": len(side.seeds)}
        row |= {"difference": difference.mean, "low": difference.low, "high": difference.high}
        row |= {"p_value": difference.p_value, "holm_over": len(pairs), "condition": condition.title}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: generated.cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue().rstrip("\n")


NOTE = "test accuracies in %, mean ± sample standard deviation over n seeds; the difference B - A in points."
FORMATS = {"text": _text, "markdown": _markdown, "csv": _csv, "latex": _latex}


def _table(comparison: Comparison) -> list[list[str]]:
    """The head, and a row for each pair."""
    rows = [["A", "accuracy of A (n)", "B", "accuracy of B (n)", "difference", "95 % interval", "p"]]
    for other, difference in comparison.pairs:
        cells = []
        for side in (comparison.reference, other):
            mean, std = side.mean_and_std
            cells += [side.entry, f"{mean:.2f} ± {std:.2f} ({len(side.seeds)})"]
        interval = f"{_points(difference.low)} to {_points(difference.high)}"
        p = _p(difference.p_value).removeprefix("p ").removeprefix("= ")
        rows.append([*cells, _points(difference.mean), interval, p])
    return rows


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"


def _p(p_value: float) -> str:
    return "p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}"


def _escaped(text: str) -> str:
    """For LaTeX, in its text mode."""
    signs = {
        "±": r"$\pm$",
        "<": "$<$",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    return "".join(signs.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


if __name__ == "__main__":
    main()
