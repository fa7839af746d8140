"""docs/reliability.md, rendered from the outcomes of a soak."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fmbench.pages import generated

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "reliability.md"
OUTCOMES = Path(__file__).with_name("outcomes.jsonl")
MARKS = {
    name: (f"<!-- {name}: begin -->", f"<!-- {name}: end -->") for name in ("conditions", "faults", "obstacles")
}
COLUMNS = {
    "survived": "survived",
    "lost": "lost",
    "hung": "hung",
    "believed": "wrongly believed",
    "traceback": "tracebacks",
}


def read(path: Path = OUTCOMES) -> list[dict[str, Any]]:
    """The conditions of a soak, and an outcome for each fault."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(outcomes: list[dict[str, Any]]) -> list[str]:
    """A row for each kind, in the order of the code, and one for all; fuzzing, of many inputs, stands apart."""
    lines = [
        f"| fault | tried | {' | '.join(COLUMNS.values())} |",
        f"|:--|--:|{'--:|' * len(COLUMNS)}",
    ]
    kinds: dict[str, Counter[str]] = {}
    for outcome in sorted(outcomes[1:], key=lambda outcome: outcome["order"]):
        count = kinds.setdefault(outcome["kind"], Counter())
        count[outcome["outcome"]] += outcome["inputs"]
    rows = {title: counts for title, counts in kinds.items() if not title.startswith("fuzzing")}
    rows["**all faults**"] = sum(rows.values(), Counter())
    rows |= {title: counts for title, counts in kinds.items() if title.startswith("fuzzing")}
    for title, counts in rows.items():
        lines.append(f"| {title} | {counts.total():,} | {' | '.join(f'{counts[name]:,}' for name in COLUMNS)} |")
    return lines


def conditions(outcomes: list[dict[str, Any]]) -> list[str]:
    """Where and when, in a sentence."""
    first = outcomes[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    minutes = sum(outcome["seconds"] for outcome in outcomes[1:]) / 60
    return [
        f"{first['date']}, commit {first['commit']}, {first['machine']}, as {first['user']}, {versions}; "
        f"{minutes:.0f} minutes of one worker."
    ]


def obstacles(outcomes: list[dict[str, Any]]) -> list[str]:
    """What this machine could not cause, and why."""
    here = [f"- {title}: {reason}" for title, reason in outcomes[0]["not_caused"].items()]
    return here or ["Of the kinds above, all could be caused."]


def pages(outcomes: list[dict[str, Any]]) -> dict[Path, str]:
    """The page as the outcomes have it."""
    parts = {"conditions": conditions, "faults": table, "obstacles": obstacles}
    text = PAGE.read_text()
    for name, lines in parts.items():
        before, _, rest = text.partition(MARKS[name][0])
        _, _, after = rest.partition(MARKS[name][1])
        text = before + "\n\n".join([MARKS[name][0], "\n".join(lines(outcomes)), MARKS[name][1]]) + after
    return {PAGE: text}


def write(outcomes: list[dict[str, Any]]) -> None:
    """Writes the page, and the outcomes it is made of."""
    content = "".join(json.dumps(outcome) + "\n" for outcome in outcomes)
    generated.write(pages(outcomes) | {OUTCOMES: content})
