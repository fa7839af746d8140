"""Draws results/pareto.svg: what accuracy costs, in core-seconds of training on each machine and in parameters.

python -m fmbench.pareto
"""

from collections import Counter
from pathlib import Path

from fmbench.errors import UserError
from fmbench.pages import leaderboard
from fmbench.records import store
from fmbench.system import command_line


@command_line.plain_errors("pareto")
def main() -> None:
    parser = command_line.Parser("pareto", description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    arguments = parser.parse_args()
    path = arguments.results_dir / "pareto.svg"
    with command_line.needs_extra("figures"):
        from fmbench.pages import drawing, pareto
    records = store.read_all(arguments.results_dir)
    alone = {path: record for path, record in records.items() if not record.trained_with}
    conditions = leaderboard.entries_by_condition(alone)
    if not conditions:
        raise UserError(f"{arguments.results_dir} has no records of completed runs to draw.")
    num_entries: Counter[str] = Counter()
    for condition, entries in conditions.items():
        num_entries[condition.data_version] += len(entries)
    ((data_version, num_drawn),) = num_entries.most_common(1)
    points = {
        condition.title: [pareto.point_of(list(runs.values())) for runs in entries]
        for condition, entries in conditions.items()
        if condition.data_version == data_version
    }
    drawing.save(pareto.draw(points, num_entries.total() - num_drawn), path)
    print(f"{path}: {num_drawn} entries.")


if __name__ == "__main__":
    main()
