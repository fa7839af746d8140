"""What all commands share: flags, mistakes told in one line, exit codes."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from fmbench.errors import UserError, is_out_of_memory, nearest


class Parser(argparse.ArgumentParser):
    """Parses the flags of `python -m fmbench.<name>`; a mistake is one line, and exit code 2."""

    def __init__(self, name: str, **settings: Any) -> None:
        """Takes argparse's settings, too."""
        started_as = sys.argv[0] if sys.argv[0].startswith("fmbench ") else f"python -m fmbench.{name}"
        settings.setdefault("prog", started_as)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)
        self.name = name
        self.words: list[str] = []
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest[0])
        return arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def refuse(self, word: str) -> NoReturn:
        """Ends the process: there is no such flag."""
        flag = word.partition("=")[0]
        if flag.startswith("-"):
            subcommands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
            parsers = [self, *(parser for action in subcommands for parser in action.choices.values())]
            known = [name for parser in parsers for name in parser._option_string_actions if name.startswith("--")]
            self._exit(f"there is no flag {flag}{nearest(flag, known)}")
        self._exit(f"unexpected argument '{word}'")

    def error(self, message: str) -> NoReturn:
        """Ends the process; that a flag is missing is said after that another is mistyped."""
        for flag in (word.partition("=")[0] for word in self.words if word.startswith("--")):
            if not any(known.startswith(flag) for known in self._option_string_actions):
                self.refuse(flag)
        self._exit(message)

    def _exit(self, message: str) -> NoReturn:
        self.exit(2, f"fmbench.{self.name}: {message}; --help lists the flags.\n")


def whole_number(text: str) -> int:
    """An int, for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number") from None


def number(text: str) -> float:
    """A float, for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number") from None


@contextlib.contextmanager
def plain_errors(name: str, interrupted: str = "interrupted.") -> Iterator[None]:
    """Ends the process with one line: with 2 on a user's mistake or where memory ends, with 130 on Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"fmbench.{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"fmbench.{name}: {interrupted}", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        print(f"fmbench.{name}: out of memory, which others may hold, too ({first_line})", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of packages that come with an extra of fmbench.

    Raises:
        UserError: If one is not installed; says how to install it.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error.name} is missing; it comes with pip install 'fmbench[{extra}]'.") from error
