"""Prints when a record or a row of the leaderboard changed, by which commit, and from what to what.

    python -m fmbench.history                  all commits that changed results, the newest first
    python -m fmbench.history speedrun-94      those that changed records or rows with this in their name

It reads git's log of results/runs and results/leaderboard.csv on the branch at hand, merge by merge. There is no
page of it among the results: it would have to name the commit that it is in.

+ came, - went, ~ changed. Accuracies are fractions, times seconds.
"""

import sys
from pathlib import Path

from fmbench.contributions import history
from fmbench.errors import UserError
from fmbench.system import command_line


@command_line.plain_errors("history")
def main() -> None:
    parser = command_line.Parser("history", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="part of the names of records or rows")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="in a clone (default: results)")
    arguments = parser.parse_args()
    if not arguments.results_dir.is_dir():
        raise UserError(f"--results_dir={arguments.results_dir} is not a directory; go to a clone of fmbench.")
    commits = history.read(arguments.results_dir)
    if history.is_cut(arguments.results_dir):
        print("This clone is shallow, and the history cut: git fetch --unshallow.", file=sys.stderr)
    for commit in reversed(commits):
        changes = [change for change in commit.changes if arguments.name in change.name]
        if changes:
            print(command_line.in_one_line(f"{commit.created[:16]}Z {commit.commit[:7]} {commit.subject}"))
            for change in changes:
                print(command_line.in_one_line(f"  {history.in_words(change)}"))


if __name__ == "__main__":
    main()
