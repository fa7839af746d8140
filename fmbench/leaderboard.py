"""Renders the records: results/leaderboard.md and .csv.

python -m fmbench.leaderboard            write them
python -m fmbench.leaderboard --check    fail if they, or an accuracy, are not what the records say
"""

from fmbench.pages import generated, leaderboard
from fmbench.system import command_line


@command_line.plain_errors("leaderboard")
def main() -> None:
    generated.command_line("leaderboard", __doc__, leaderboard.files)


if __name__ == "__main__":
    main()
