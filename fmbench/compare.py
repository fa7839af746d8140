"""Says how much better one entry is than another, and whether that is more than luck.

    python -m fmbench.compare speedrun-94 speedrun-95 --dtype=float32
    python -m fmbench.compare speedrun-94 speedrun-95 --dtype=float32 --format=latex

Takes the completed records of both entries in <results_dir>/runs that were made under one condition: data, device,
number of devices, dtype. Prints the difference of the mean test accuracies, B minus A, with its 95 % interval and
p-value, by a test in which seeds and test images are both chance. It is one comparison, so p is not corrected; the
ranks of the leaderboard are corrected for all pairs of a table.

Exit codes: 0 done, 2 something given cannot be used, a single seed included: no test can be made of it.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbench.errors import UserError, nearest
from fmbench.pages import leaderboard
from fmbench.pages.leaderboard import Condition
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import Difference, mean_and_std, recipe_difference
from fmbench.system import command_line

Entries = dict[str, dict[Path, RunRecord]]  # by name, the runs in the order of their seeds


class Side(NamedTuple):
    """An entry's runs."""

    entry: str
    seeds: list[int]
    correct: np.ndarray  # bool (seeds, num_test)

    @property
    def mean_and_std(self) -> tuple[float, float]:
        """Of the test accuracies, in percent."""
        mean, std = mean_and_std(self.correct.mean(axis=1).tolist())
        assert std is not None  # there are several seeds
        return 100 * mean, 100 * std


class Comparison(NamedTuple):
    """B minus A under one condition."""

    condition: Condition
    a: Side
    b: Side
    difference: Difference


@command_line.plain_errors("compare")
def main() -> None:
    parser = command_line.Parser("compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="an entry, as the leaderboard calls it")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--dtype", help="of the runs, where both entries have several")
    parser.add_argument("--condition", default="", help="a part of its title, where they share several")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    arguments = parser.parse_args()
    print(FORMATS[arguments.format](_compare(arguments)))


def _compare(arguments: argparse.Namespace) -> Comparison:
    if arguments.a == arguments.b:
        raise UserError(f"{arguments.a} is compared with itself; name two entries.")
    conditions = _conditions(arguments.results_dir)
    known = {entry for entries in conditions.values() for entry in entries}
    for entry in (arguments.a, arguments.b):
        if entry not in known:
            raise UserError(f"{arguments.results_dir} has no completed run of {entry}{nearest(entry, known)}.")
    condition = _the_condition(conditions, arguments)
    sides = [_side(entry, conditions[condition][entry]) for entry in (arguments.a, arguments.b)]
    if single := [side.entry for side in sides if len(side.seeds) == 1]:
        raise UserError(
            f"no test is possible: {' and '.join(single)} {'have' if single[1:] else 'has'} a single seed (n = 1) "
            f"on {condition.title}, which does not say how much a recipe varies; run more seeds."
        )
    a, b = sides
    return Comparison(condition, a, b, recipe_difference(a.correct, b.correct))


def _side(entry: str, runs: dict[Path, RunRecord]) -> Side:
    return Side(entry, [run.seed for run in runs.values()], leaderboard.correct(runs))


def _conditions(results_dir: Path) -> dict[Condition, Entries]:
    if not results_dir.is_dir():
        raise UserError(f"--results_dir={results_dir} is not a directory.")
    by_condition = leaderboard.entries_by_condition(store.read_all(results_dir))
    return {
        condition: {next(iter(runs.values())).entry: runs for runs in entries}
        for condition, entries in by_condition.items()
    }


def _the_condition(conditions: dict[Condition, Entries], arguments: argparse.Namespace) -> Condition:
    """The one under which both entries were run, and which the flags admit."""
    both = (arguments.a, arguments.b)
    shared = [condition for condition, entries in conditions.items() if entries.keys() >= set(both)]
    if not shared:
        having = {entry: [c for c, entries in conditions.items() if entry in entries] for entry in both}
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
        raise UserError(
            f"both were run on {_titles(admitted or shared)}; choose one of these with --dtype or --condition."
        )
    return admitted[0]


def _titles(conditions: Iterable[Condition]) -> str:
    return " and on ".join(condition.title for condition in conditions)


def _text(comparison: Comparison) -> str:
    condition, a, b, difference = comparison
    lines = [
        f"{b.entry} minus {a.entry}: {_points(difference.mean)} points, 95 % interval {_points(difference.low)} "
        f"to {_points(difference.high)}, {_p(difference.p_value)}"
    ]
    for side in (a, b):
        mean, std = side.mean_and_std
        seeds = ", ".join(map(str, side.seeds))
        lines.append(f"{side.entry}: mean {mean:.2f} %, std {std:.2f}, n = {len(side.seeds)} (seeds {seeds})")
    lines.append(f"on {condition.title}; the same {a.correct.shape[1]:,} test images")
    return "\n".join(lines)


def _markdown(comparison: Comparison) -> str:
    condition, *_ = comparison
    head, cells = zip(*_cells(comparison), strict=True)
    return "\n".join(
        [
            f"| {' | '.join(head)} |",
            "|:--|--:|:--|--:|--:|--:|--:|",
            f"| {' | '.join(cells)} |",
            "",
            f"{condition.title}; {NOTE}",
        ]
    )


def _latex(comparison: Comparison) -> str:
    condition, *_ = comparison
    head, cells = ([_escaped(cell) for cell in cells] for cells in zip(*_cells(comparison), strict=True))
    return "\n".join(
        [
            "% " + f"{condition.title}; {NOTE}".replace("±", "+-"),
            r"\begin{tabular}{lrlrrrr}",
            r"\hline",
            " & ".join(head) + r" \\",
            r"\hline",
            " & ".join(cells) + r" \\",
            r"\hline",
            r"\end{tabular}",
        ]
    )


NOTE = "test accuracies in %, mean ± sample standard deviation over n seeds; the difference B - A in points."
FORMATS = {"text": _text, "markdown": _markdown, "latex": _latex}


def _cells(comparison: Comparison) -> list[tuple[str, str]]:
    """Head and content of every column."""
    _, a, b, difference = comparison
    columns = []
    for name, side in {"A": a, "B": b}.items():
        mean, std = side.mean_and_std
        columns += [(name, side.entry), (f"accuracy of {name} (n)", f"{mean:.2f} ± {std:.2f} ({len(side.seeds)})")]
    return [
        *columns,
        ("difference", _points(difference.mean)),
        ("95 % interval", f"{_points(difference.low)} to {_points(difference.high)}"),
        ("p", _p(difference.p_value).removeprefix("p ").removeprefix("= ")),
    ]


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
