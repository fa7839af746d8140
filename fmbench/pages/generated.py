"""Generated files: what belongs in them is rendered first, then written or compared with what is there.

Records may come from strangers. `text`, `link` and `cell` show what stands in them, and let it do nothing else.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from fmbench.errors import UserError
from fmbench.system.command_line import Parser
from fmbench.system.files import atomic_file


def command_line(name: str, description: str, render: Callable[[Path], Mapping[Path, str]]) -> None:
    """`python -m fmbench.<name>`: writes the files that `render` makes of a results directory, or compares them.

    Ends the process with 1 if --check finds a difference.

    Raises:
        UserError: If something given cannot be used.
    """
    parser = Parser(name, description=description)
    add_flags(parser)
    arguments = parser.parse_args()
    write_or_check(name, render, arguments.results_dir, check=arguments.check)


def add_flags(parser: Parser) -> None:
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 on a difference")


def write_or_check(
    name: str, render: Callable[[Path], Mapping[Path, str]], results_dir: Path, *, check: bool
) -> None:
    """What `command_line` does once it has read its flags."""
    if not results_dir.is_dir():
        raise UserError(f"--results_dir={results_dir} is not a directory.")
    files = render(results_dir)
    outdated = stale(files)
    if not check:
        write(files)
    names = ", ".join(map(str, files))
    if not check:
        print(f"{names} written.")
    elif outdated:
        for path in outdated:
            print(f"{path} is not what the records say; run python -m fmbench.{name}.", file=sys.stderr)
        sys.exit(1)
    else:
        print(f"The records agree with {names}.")


def text(value: str) -> str:
    """A record's text as Markdown that shows it: in one line, without markup, HTML, mathematics or links."""
    line = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;")
    line = re.sub(r"[\\`*|\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)
    return re.sub(r"(?i)(?<=www)\.", "&#46;", line.replace("://", "&#58;//"))


def one_line(value: str) -> str:
    """A record's text without line ends and whatever else cannot be seen."""
    return "".join(character if character.isprintable() else " " for character in value)


def link(name: str, config_file: str, prefix: str) -> str:
    """An entry, or whatever is called `name`, as a link to its config, if that is a path below the repository.

    `prefix` leads from the file that the link stands in to the repository.
    """
    path = PurePosixPath(config_file)
    if path.is_absolute() or not path.name or ".." in path.parts or re.search(r"[:\\]", config_file):
        return f"{text(name)} ({text(config_file)})"
    return f"[{text(name)}]({prefix}{quote(config_file)})"


def cell(value: Any) -> Any:
    """A value as CSV may have it: text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and re.match(r"\s*[=+@-]|[\t\r\n]", value) else value


def between_marks(
    path: Path, marks: tuple[str, str], parts: Sequence[str], text: str | None = None
) -> dict[Path, str]:
    """The file with `parts`, apart by empty lines, in the place of what stands between its two marks.

    `text` stands for what the file holds, where it has other marks, which have been served.

    Returns:
        Path and text; nothing, if there is no such file or it has no marks.

    Raises:
        UserError: If the marks are not in order.
    """
    try:
        if text is None:
            text = path.read_bytes().decode() if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    if not any(mark in text for mark in marks):
        return {}
    before, _, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not end or any(text.count(mark) > 1 for mark in marks):
        raise UserError(f"{path}: needs {marks[0]} and, below it, {marks[1]}, once each.")
    return {path: before + "\n\n".join([marks[0], *parts, marks[1]]) + after}


def write(files: Mapping[Path, str]) -> None:
    """Writes every file, each atomically."""
    for path, text in files.items():
        with atomic_file(path) as file:
            file.write(text.encode())


def stale(files: Mapping[Path, str]) -> list[Path]:
    """The files that are missing or not what they should be."""
    return [path for path, text in files.items() if not path.exists() or path.read_bytes() != text.encode()]
