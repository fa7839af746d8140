"""What all commands share: flags, mistakes told in one line, exit codes."""

import argparse
import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fmbench.errors import UserError, is_out_of_memory, nearest
from fmbench.system import interrupt, places

# What an operating system refuses without naming a file. Other errors without one are bugs, and have a traceback.
OF_THE_MACHINE = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room in the quota, or name another place",
    errno.EFBIG: "allow larger files (ulimit -f), or name another place",
    errno.EROFS: "name another place",
    errno.EIO: "the device fails; name another place",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "this machine has too many open files; close some",
    errno.EAGAIN: "allow more processes (ulimit -u)",
    errno.ENOMEM: "others may hold the memory; close some",
}


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
        self.register("type", Path, local_path)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest[0])
        return arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own says nothing of a device that is full

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
            if flag.startswith("--config."):  # a field; those who take none refuse it later
                continue
            if not any(known.startswith(flag) for known in self._option_string_actions):
                self.refuse(flag)
        self._exit(message)

    def _exit(self, message: str) -> NoReturn:
        _say(f"fmbench.{self.name}: {message}; --help lists the flags.")
        sys.exit(2)


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


def local_path(text: str) -> Path:
    """A path, for argparse."""
    try:
        return places.local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def in_one_line(text: str) -> str:
    """With what would end the line, or do more than be read, written out: a newline in a file's name."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def begin() -> None:
    """Makes a command of this process, as early as can be: from now on it ends as `plain_errors` has it."""
    sys.excepthook = _end_in_one_line
    for descriptor in range(3):  # one that is closed would be given to the next file
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _end_in_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For what happens before a command's `main`: while it imports."""
    if said := _said_of(error):
        _say(f"fmbench: {said}")
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def plain_errors(name: str, interrupted: str = "interrupted.") -> Iterator[None]:
    """Around a whole command: ends the process with one line, in which no traceback is.

    With 2 on what a user or the machine does wrong, with 130 on Ctrl-C, with 143 on SIGTERM; without a word, and
    with 141, where nobody reads standard output any more.

    Args:
        name: Of the command's module; '' for fmbench itself.
        interrupted: What to say on Ctrl-C.
    """
    prefix = f"fmbench.{name}".rstrip(".")
    answer = interrupt.answer
    answer.expected, answer.given = answer.listens, None
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may be ASCII, and names of files any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        except SystemExit:
            _flush_output()
            raise
        _flush_output()
    except SystemExit:
        raise
    except BaseException as error:
        answer.expected = False
        _drop_streams_that_fail()
        if signalled := error if isinstance(error, KeyboardInterrupt) else answer.given:
            _say(f"{prefix}: {interrupt.in_words(signalled, interrupted)}")
            sys.exit(interrupt.exit_code(signalled))
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        if not (said := _said_of(error)):
            raise
        _say(f"{prefix}: {said}")
        sys.exit(2)
    finally:
        answer.close()


def _said_of(error: BaseException) -> str:
    """Of what a user or the machine does wrong, in one line; '' of what is a bug."""
    first_line, *_ = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory, which others may hold, too ({first_line})"
    if isinstance(error, ValueError) and _is_of_jaxs_variables(error):
        values = [f"{name}={value!r}" for name, value in sorted(os.environ.items()) if name.startswith("JAX")]
        return f"JAX refuses the environment, which has {', '.join(values)} ({first_line})."
    if isinstance(error, FileNotFoundError) and _current_folder_is_gone():
        return "the current folder was removed; go to one that is there."
    if isinstance(error, OSError) and error.errno:
        if error.filename is None and error.errno not in OF_THE_MACHINE:
            return ""
        place = "writing" if error.filename is None else error.filename
        return f"{place}: {error.strerror}; {OF_THE_MACHINE.get(error.errno, 'name another place')}."
    return ""


def _is_of_jaxs_variables(error: ValueError) -> bool:
    """Whether JAX could not be imported, because a variable of the environment has a value that it can't have."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return "jax" not in sys.modules and frame.f_globals.get("__name__") == "jax._src.config"


def _current_folder_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _flush_output() -> None:
    if sys.stdout:
        sys.stdout.flush()


def _drop_streams_that_fail() -> None:
    """Lets what waits in standard output and error, and can't be written, go nowhere; Python would try again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(line: str) -> None:
    try:
        if sys.stderr:
            print(in_one_line(line), file=sys.stderr, flush=True)
    except OSError:
        _drop_streams_that_fail()


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of packages that come with an extra of fmbench.

    Raises:
        UserError: If one is not installed; says how to install it.
    """
    # A notebook's, which its shell commands inherit, is unknown to other environments, and nothing here is shown.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    except ImportError as error:
        if error.name is None:
            raise
        raise UserError(f"{error.name} is missing; it comes with pip install 'fmbench[{extra}]'.") from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
