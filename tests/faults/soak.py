"""Causes every fault of every kind, judges what became of it, and writes the table of docs/reliability.md.

    python tests/faults/soak.py             all, some 20 minutes on two cores; goes on where it was stopped
    python tests/faults/soak.py --write     likewise, and then writes docs/reliability.md
    python tests/faults/soak.py --twentieth     a twentieth of them, another one every day
    python tests/faults/soak.py --only=export --workers=1

Faults are really caused, to commands as users type them, in processes of their own. Exit codes: 0 all survived,
1 something did not, or the soak itself failed.
"""

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

import damage_faults
import disk_faults
import fuzz_faults
import input_faults
import kill_faults
import page
import power_faults
import shell_faults
import signal_faults
from children import Zygote, warm_process
from scene import REPOSITORY, Kind, References, Scene, prepare

from fmbench.records import machine
from fmbench.system import files

MODULES = (
    kill_faults,
    signal_faults,
    power_faults,
    damage_faults,
    disk_faults,
    input_faults,
    shell_faults,
    fuzz_faults,
)
KINDS: dict[str, Kind] = {kind.title: kind for module in MODULES for kind in module.KINDS}
_workers: dict[str, Any] = {}  # what a worker keeps between faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md and outcomes.jsonl")
    parser.add_argument("--twentieth", action="store_true", help="a twentieth of them, drawn by the date")
    parser.add_argument("--date", default=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", help="of --twentieth")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds with this in their titles")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--journal", type=Path, help="of outcomes (default: in the cache, by commit)")
    parser.add_argument("--anew", action="store_true", help="forget the journal")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.twentieth):
        parser.error("--write writes the page of all faults; drop --only and --twentieth")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background and its children ignore it
    with tempfile.TemporaryDirectory(prefix="fmbench-faults-") as scratch:
        Path(scratch).chmod(0o755)  # some faults are another user's
        outcomes, num_errors = soak(arguments, Path(scratch))
    print("\n".join(page.table(outcomes)))
    if arguments.write and not num_errors:
        page.write(outcomes)
    bad = [outcome for outcome in outcomes if outcome.get("outcome", "survived") != "survived"]
    for outcome in bad:
        print(f"{outcome['outcome']}: {outcome['kind']}, {outcome['case']}: {outcome['detail']}")
    if num_errors:
        print(f"The soak itself failed at {num_errors} faults, which are not in the table.")
    sys.exit(1 if bad or num_errors else 0)


def soak(arguments: argparse.Namespace, scratch: Path) -> tuple[list[dict[str, Any]], int]:
    """Tries what is not in the journal yet; returns the journal, and how often the soak itself failed."""
    journal = (
        arguments.journal
        or files.cache_directory() / "faults" / f"{_commit()}{'-twentieth' * arguments.twentieth}.jsonl"
    )
    if arguments.anew or arguments.twentieth:
        journal.unlink(missing_ok=True)
    journal.parent.mkdir(parents=True, exist_ok=True)
    with warm_process() as warm:
        references = prepare(warm, scratch / "references")
    selected = {title: kind for title, kind in KINDS.items() if arguments.only in title}
    obstacles = {title: obstacle for title, kind in selected.items() if (obstacle := kind.obstacle())}
    for title, reason in obstacles.items():
        print(f"not caused here: {title}: {reason}")
    faults = [(title, case) for title, kind in selected.items() for case in kind.cases(references)]
    if arguments.twentieth:
        print(f"seed: {arguments.date}")
        faults = twentieth(faults, arguments.date)
    if not journal.exists():
        _append(journal, conditions() | {"not_caused": obstacles})
    outcomes = page.read(journal)
    tried = {(outcome["kind"], outcome["case"]) for outcome in outcomes[1:]}
    left = [fault for fault in faults if fault not in tried and fault[0] not in obstacles]
    random.Random(0).shuffle(
        left
    )  # so that both workers have slow and fast ones, and the clock tells how many are left
    began, num_errors = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers, functools.partial(_begin, scratch, references)) as pool:
        for number, outcome in enumerate(pool.imap_unordered(_attempt, left), 1):
            if outcome["outcome"] == "error":
                print(
                    f"The soak itself failed at {outcome['kind']}, {outcome['case']}: {outcome['detail']}",
                    flush=True,
                )
                num_errors += 1
                continue
            _append(journal, outcome)
            if outcome["outcome"] != "survived" or number % 50 == 0 or number == len(left):
                told = f"{outcome['outcome']}: {outcome['kind']}, {outcome['case']}: {outcome['detail'][:200]}"
                print(f"{number}/{len(left)}, {time.monotonic() - began:.0f} s; {told}", flush=True)
        pool.close()
        pool.join()
    return [
        outcomes[0],
        *(outcome for outcome in page.read(journal)[1:] if (outcome["kind"], outcome["case"]) in faults),
    ], num_errors


def twentieth(faults: list[tuple[str, str]], date: str) -> list[tuple[str, str]]:
    """A twentieth of them, drawn by the date."""
    return random.Random(date).sample(faults, len(faults) // 20)


def _begin(scratch: Path, references: References) -> None:
    """A worker's start: a warm process of its own, which ends with it."""
    _workers["warm"] = Zygote()
    _workers["scratch"], _workers["references"] = scratch, references


def _attempt(fault: tuple[str, str]) -> dict[str, Any]:
    """Tries one fault; what the soak itself does wrong is told, and not counted."""
    title, case = fault
    folder = _workers["scratch"] / f"fault-{zlib.crc32(title.encode()):08x}-{zlib.crc32(case.encode()):08x}"
    began = time.monotonic()
    try:
        verdict = KINDS[title].attempt(
            Scene(_workers["warm"], _workers["references"], folder, f"{title} {case}"), case
        )
    except Exception:
        return {"kind": title, "case": case, "outcome": "error", "detail": traceback.format_exc()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - began, 1)
    detail = " ".join(verdict.detail.replace(str(folder), "DIR").replace(str(_workers["scratch"]), "DIR").split())[
        :300
    ]
    return {
        "kind": title,
        "case": case,
        "outcome": verdict.outcome,
        "inputs": verdict.inputs,
        "detail": detail,
        "seconds": seconds,
        "order": list(KINDS).index(title),
    }


def conditions() -> dict[str, Any]:
    """Where and when a soak was made."""
    here = machine.environment(ask_driver=False)
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "commit": _commit(),
        "machine": f"{here.cpu}, {here.cpu_cores} cores, {platform.system()} {platform.release()}",
        "versions": {name: here.versions.get(name) for name in ("jax", "orbax-checkpoint")}
        | {"python": here.python},
        "user": "root" if os.getuid() == 0 else "not root",
    }


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def _append(journal: Path, line: dict[str, Any]) -> None:
    with journal.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
