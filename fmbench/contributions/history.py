"""The history of results: which commit changed a record or a row of the leaderboard, from what to what.

It is that of the branch at hand, merge by merge: what a merge brought is the merge's change. So each state begins
as the one before it ended.
"""

import csv
import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmbench.contributions import git

RUNS, BOARD = "runs", "leaderboard.csv"
# What makes a row of the board that row, and what it was before there was the column.
CONDITION = {"data_version": "", "device": "", "num_devices": "1", "dtype": "", "trained_with": "0"}
CONDITION |= {"num_processes": "1", "num_hosts": "1", "shared_by": "1"}
SHOWN = ("status", "test_accuracy", "val_accuracy", "train_seconds", "train_core_seconds", "num_epochs")

Values = dict[str, Any]


class Change(NamedTuple):
    """Of one record or row, at one commit."""

    kind: str  # record, row
    name: str
    before: Values | None  # None: it came
    after: Values | None  # None: it went

    @property
    def differing(self) -> dict[str, tuple[Any, Any]]:
        """What was changed, by field: before and after."""
        before, after = self.before or {}, self.after or {}
        fields = dict.fromkeys([*before, *after])
        return {
            field: (before.get(field), after.get(field))
            for field in fields
            if before.get(field) != after.get(field)
        }


class Commit(NamedTuple):
    """A commit that changed results."""

    commit: str
    created: str  # UTC, ISO 8601
    subject: str
    changes: list[Change]


def read(results_dir: Path) -> list[Commit]:
    """All commits of this branch that changed a record or a row, the oldest first.

    Raises:
        UserError: If git knows no such folder.
    """
    log = git.ask(
        results_dir, "log", "--first-parent", "--reverse", "--format=%H%x09%ct%x09%s", "--", RUNS, BOARD
    ).decode(errors="replace")
    lines = [line.split("\t", 2) for line in log.split("\n") if line]
    states = [git.files(results_dir, commit, RUNS, BOARD) for commit, _, _ in lines]
    contents = git.blobs(results_dir, [one for state in states for path, one in state.items() if _counts(path)])
    parsed = {one: _parse(content) for one, content in contents.items()}
    found = []
    before: dict[str, str] = {}
    for (commit, seconds, subject), after in zip(lines, states, strict=True):
        created = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).isoformat(timespec="seconds")
        records = _changes("record", _records(before, parsed), _records(after, parsed))
        rows = _changes(
            "row", _rows(contents.get(before.get(BOARD, ""))), _rows(contents.get(after.get(BOARD, "")))
        )
        if changes := [*records, *rows]:
            found.append(Commit(commit, created, subject, changes))
        before = after
    return found


def is_cut(results_dir: Path) -> bool:
    """Whether the clone is shallow, and the history begins later than the results do."""
    return git.ask(results_dir, "rev-parse", "--is-shallow-repository").strip() == b"true"


def _counts(path: str) -> bool:
    return path == BOARD or path.endswith(".json")


def _parse(content: bytes) -> Values:
    """A record of whatever schema, or whatever else a file was: no more than its fields are asked for."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _records(state: Mapping[str, str], parsed: Mapping[str, Values]) -> dict[str, Values]:
    return {Path(path).stem: parsed[one] for path, one in state.items() if path.endswith(".json")}


def _rows(content: bytes | None) -> dict[str, Values]:
    """The rows of the board by entry and condition; of several, made with unlike libraries, in their order."""
    rows: dict[str, Values] = {}
    for row in csv.DictReader((content or b"").decode(errors="replace").splitlines()):
        condition = [row.get(column) or default for column, default in CONDITION.items()]
        plain = [value for value, default in zip(condition, CONDITION.values(), strict=True) if value != default]
        name = f"{row.get('entry')} ({', '.join(plain)})"
        while name in rows:
            name += " again"
        rows[name] = {column: value for column, value in row.items() if column not in (*CONDITION, "entry")}
    return rows


def _changes(kind: str, before: Mapping[str, Values], after: Mapping[str, Values]) -> Iterator[Change]:
    """What differs between two states; what only took another name, with all its content, is one change."""
    gone = {name: values for name, values in before.items() if name not in after}
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after:
            if before[name] != after[name]:
                yield Change(kind, name, before[name], after[name])
        elif name in after:
            old = [one for one, values in gone.items() if kind == "record" and _is_same_run(values, after[name])]
            if old:
                del gone[old[0]]
                yield Change(kind, f"{old[0]} -> {name}", before[old[0]], after[name])
            else:
                yield Change(kind, name, None, after[name])
    for name, values in sorted(gone.items()):
        yield Change(kind, name, values, None)


def _is_same_run(values: Values, others: Values) -> bool:
    keys = ("created", "seed", "predictions_sha256")
    return all(values.get(key) == others.get(key) for key in keys)


def in_words(change: Change) -> str:
    """A change in one line."""
    if change.before is None or change.after is None:
        values = change.after or change.before or {}
        shown = [f"{field} {_text(values[field])}" for field in SHOWN if values.get(field) not in (None, "")]
        return f"{'+' if change.before is None else '-'} {change.kind} {change.name}: {', '.join(shown)}"
    differing = change.differing
    plain = {
        field: f"{field} {_text(old)} -> {_text(new)}"
        for field, (old, new) in differing.items()
        if _text(old) != _text(new) and not isinstance(old, dict | list) and not isinstance(new, dict | list)
    }
    others = [field for field in differing if field not in plain]
    told = [*plain.values(), *([f"also {', '.join(others)}"] if others else [])]
    return f"~ {change.kind} {change.name}: {'; '.join(told) or 'the same content'}"


def _text(value: Any) -> str:
    """Short: numbers with six digits, of the CSV file, too."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return "none" if value in (None, "") else f"{value:.60}" if isinstance(value, str) else "..."
    return f"{number:.6g}" if "." in str(value) else str(value)[:60]
