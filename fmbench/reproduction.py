"""Renders results/reproduction.md: what the reference systems published, beside what their entries gave here.

python -m fmbench.reproduction            write it
python -m fmbench.reproduction --check    fail if it is not what the records say
"""

from fmbench.pages import generated, reproduction
from fmbench.system import command_line


@command_line.plain_errors("reproduction")
def main() -> None:
    generated.command_line("reproduction", __doc__, reproduction.files)


if __name__ == "__main__":
    main()
