"""The command `fmbench`: each of its subcommands is a module of this folder, `fmbench train` is fmbench.main."""

import ast
import importlib
import sys
from pathlib import Path

from fmbench.errors import UserError, nearest
from fmbench.system import command_line

ENDING = 'if __name__ == "__main__":\n    main()\n'  # of the modules that are commands
TRAIN = "main"  # the module of `fmbench train`


def commands() -> dict[str, str]:
    """The subcommands with the first lines of their modules' docstrings, which no module is imported for."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if source.endswith(ENDING) and path != Path(__file__):
            summary, *_ = (ast.get_docstring(ast.parse(source)) or "").splitlines()
            found["train" if path.stem == TRAIN else path.stem] = summary
    return dict(sorted(found.items()))


@command_line.plain_errors("")
def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    known = commands()
    if command in ("--help", "-h", "help"):
        lines = [f"  {name:<15} {summary}" for name, summary in known.items()]
        head = "Usage: fmbench COMMAND [FLAG ...]\n\n`fmbench COMMAND --help` says more of each:\n"
        print(head, *lines, sep="\n")
        return
    if command not in (*known, TRAIN):
        raise UserError(f"there is no command '{command}'{nearest(command, known)}; --help lists them.")
    module = TRAIN if command == "train" else command
    sys.argv = [f"fmbench {command}", *rest]
    importlib.import_module(f"fmbench.{module}").main()


if __name__ == "__main__":
    main()
