"""Draws results/pareto.svg: what accuracy costs, in core-seconds of training on each machine and in parameters.

    python -m fmbench.pareto
    python -m fmbench.pareto --entries=mlp,tiny-20k --figure=few.pdf

Entries below 85 % are left out and named below the panels, unless --entries chooses some, which are shown whatever
they reach.
"""

from collections import Counter
from pathlib import Path

from fmbench.errors import UserError, nearest
from fmbench.pages import leaderboard
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.system import command_line

Conditions = dict[leaderboard.Condition, list[dict[Path, RunRecord]]]  # as `leaderboard.entries_by_condition`


@command_line.plain_errors("pareto")
def main() -> None:
    parser = command_line.Parser("pareto", description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--entries", default="", metavar="A,B", help="draw these alone (default: all)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="default: <results_dir>/pareto.svg")
    arguments = parser.parse_args()
    chosen = set(filter(None, arguments.entries.split(",")))
    if chosen and not arguments.figure:
        raise UserError("--entries draws another picture than pareto.svg; name its file, as in --figure=few.svg.")
    path = arguments.figure or arguments.results_dir / "pareto.svg"
    with command_line.needs_extra("figures"):
        from fmbench.pages import drawing, pareto
    drawing.check_ending("--figure", path)
    records = store.read_all(arguments.results_dir)
    alone = {path: record for path, record in records.items() if not record.trained_with}
    conditions = leaderboard.entries_by_condition(alone)
    if not conditions:
        raise UserError(f"{arguments.results_dir} has no records of completed runs to draw.")
    if chosen:
        conditions = _choose(conditions, chosen, arguments.results_dir)
    num_entries: Counter[str] = Counter()
    for condition, entries in conditions.items():
        num_entries[condition.data_version] += len(entries)
    ((data_version, num_drawn),) = num_entries.most_common(1)
    points = {
        condition.title: [pareto.point_of(list(runs.values())) for runs in entries]
        for condition, entries in conditions.items()
        if condition.data_version == data_version
    }
    least = 0.0 if chosen else pareto.LEAST_ACCURACY
    drawing.save(pareto.draw(points, num_entries.total() - num_drawn, least), path)
    print(f"{path}: {num_drawn} entries.")


def _choose(conditions: Conditions, chosen: set[str], results_dir: Path) -> Conditions:
    """What the conditions have of the chosen entries."""
    known = {next(iter(runs.values())).entry for entries in conditions.values() for runs in entries}
    for entry in sorted(chosen - known):
        raise UserError(f"{results_dir} has no completed run of {entry}{nearest(entry, known)}.")
    found = {
        condition: [runs for runs in entries if next(iter(runs.values())).entry in chosen]
        for condition, entries in conditions.items()
    }
    return {condition: entries for condition, entries in found.items() if entries}


if __name__ == "__main__":
    main()
