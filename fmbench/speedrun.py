"""Renders the speed records: results/speedrun.md, and the short table in the README.

python -m fmbench.speedrun            write them
python -m fmbench.speedrun --check    fail if they are not what the records say
"""

from fmbench.pages import generated, speedrun


def main() -> None:
    generated.command_line("speedrun", __doc__, speedrun.files)


if __name__ == "__main__":
    main()
