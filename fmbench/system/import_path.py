"""What lies outside of fmbench, by its import path: 'mypackage.nets:Little'."""

import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fmbench.errors import UserError, nearest

LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def is_import_path(name: str) -> bool:
    """Whether this is one, and not a name of ours."""
    return ":" in name


def load(path: str, where: str) -> Any:
    """Imports the module before the colon and returns what it calls by the name after it.

    Modules are looked for as Python does, and last in the current folder.

    Args:
        path: 'package.module:Name'.
        where: The field that holds it, for messages: 'config.model.name'.

    Raises:
        UserError: If there is no such module, it fails, or has nothing of that name.
    """
    said = f"{where} is '{path}'"
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", path, re.ASCII):
        raise UserError(f"{said}; an import path is package.module:Name, as in mypackage.nets:Little.")
    module_name, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever their module may raise, its author wants to read it
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{said}, but there is no module '{error.name}'; install its package, or start from the folder "
                "that it lies in."
            ) from error
        raise UserError(f"{said}, but importing '{module_name}' fails: {describe(error)}.") from error
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{said}, but module '{module_name}' has no '{name}'{nearest(name, public)}.")
    return getattr(module, name)


def unknown(where: str, name: str, known: Collection[str]) -> UserError:
    """The error for a name that is neither one of ours nor an import path."""
    return UserError(
        f"{where} is '{name}'; it must be one of {', '.join(known)}, or an import path like "
        f"mypackage.module:Name{nearest(name, known)}."
    )


def misfit(function: Callable[..., Any], *, given: Collection[str], places: int = 0) -> str:
    """Why `function` cannot be called in this way, in words; '' if it can.

    Args:
        function: A function, or a class.
        given: Names of keyword arguments.
        places: Arguments that are given by their place.
    """
    called = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    parameters = list(inspect.signature(called).parameters.values())
    parameters = parameters[1:] if called is not function else parameters  # without self
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    kinds = {p.kind for p in parameters}
    by_name = {p.name: p for p in by_place[places:] if p.kind is p.POSITIONAL_OR_KEYWORD}
    by_name |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    parts = []
    if len(by_place) < places and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.append(f"takes {len(by_place)} arguments by their place, and is given {places}")
    if inspect.Parameter.VAR_KEYWORD not in kinds and (excess := [n for n in given if n not in by_name]):
        parts.append(f"does not take {', '.join(excess)}")
    if missing := [n for n, p in by_name.items() if p.default is p.empty and n not in given]:
        parts.append(f"also needs {', '.join(missing)}")
    return " and ".join(parts)


def named_arguments(function: Callable[..., Any], fields: Collection[str]) -> list[str]:
    """Those of the `fields` that `function` has parameters for, by their names."""
    called = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    return [name for name in inspect.signature(called).parameters if name in fields]


def describe(error: Exception, of: Any = None) -> str:
    """'TypeError: no such thing (nets.py:12)': the kind, the message and the line of their code.

    Args:
        error: As it was caught.
        of: The function or class whose file is theirs; None stands for whatever is neither ours nor a library.
    """
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(".: ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text.partition(' (')[0]} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    file = inspect.getsourcefile(of) if of is not None else None
    theirs = [frame for frame in frames if (frame.filename == file if file else not _is_library(frame.filename))]
    return f"{text} ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else text


def _is_library(file: str) -> bool:
    return file.startswith(("<", *LIBRARIES)) or file == __file__
