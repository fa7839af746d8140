"""What a record must hold before it stands among the committed ones; SUBMITTING.md has the rules in words."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fmbench.contributions import git
from fmbench.data import proof
from fmbench.errors import UserError
from fmbench.pages import leaderboard, speedrun
from fmbench.records import store
from fmbench.records.schema import Epoch, RunRecord
from fmbench.system import files

RECORD = "record.json"  # in a work directory
LATER = "not looked at before the rest holds"


class Candidate(NamedTuple):
    """A run that somebody wants among the committed ones; its predictions lie beside its record."""

    path: Path  # of the record
    log: Path | None  # metrics.jsonl of its work directory


class Finding(NamedTuple):
    """What one check found."""

    check: str
    problem: str  # with its remedy; '' if there is none


class Checked(NamedTuple):
    """A candidate and what was found; it has a record if that can be read."""

    candidate: Candidate
    record: RunRecord | None
    findings: list[Finding]

    @property
    def name(self) -> str:
        return self.record.name if self.record else str(self.candidate.path)

    @property
    def holds(self) -> bool:
        return not any(finding.problem for finding in self.findings)


def candidate(path: Path) -> Candidate:
    """A record's file, or a run's work directory.

    Raises:
        UserError: If there is neither.
    """
    record = path / RECORD if path.is_dir() else path
    if not record.exists():
        remedy = "holds no record; complete its run" if path.is_dir() else "is not there"
        raise UserError(f"{path} {remedy}. Name a record's file, or the work directory of a completed run.")
    log = record.with_name("metrics.jsonl")
    return Candidate(record, log if record.name == RECORD and log.exists() else None)


def check(candidates: Sequence[Candidate], results_dir: Path, *, replaces: bool) -> list[Checked]:
    """Checks records beside those of `results_dir`, and beside each other.

    Args:
        candidates: Their records, with the predictions beside them.
        results_dir: In a clone of the repository.
        replaces: Whether one may have the name of another run's record there.

    Raises:
        UserError: If `results_dir` has records that cannot be read, or git does not know it.
    """
    git.ask(results_dir, "rev-parse", "HEAD")
    read: dict[Path, RunRecord] = {}
    checked = []
    for one in candidates:
        try:
            read[one.path] = store.read(one.path)
        except UserError as error:
            checked.append(Checked(one, None, [Finding("schema", str(error))]))
    names = {record.name for record in read.values()}
    committed = {path: one for path, one in store.read_all(results_dir).items() if one.name not in names}
    beside = {
        path: one
        for path, one in (committed | read).items()
        if one.status == "completed" and one.data_version == proof.STANDARD
    }
    for one in candidates:
        if record := read.get(one.path):
            others = {path: other for path, other in beside.items() if other.name != record.name}
            twice = [other for path, other in read.items() if other.name == record.name and path != one.path]
            findings = [Finding("schema", ""), *_findings(one, record, others, results_dir, replaces)]
            if twice:
                findings.append(Finding("once", f"{record.name} is given twice; leave one out"))
            checked.append(Checked(one, record, findings))
    return checked


def _findings(
    one: Candidate, record: RunRecord, others: dict[Path, RunRecord], results_dir: Path, replaces: bool
) -> list[Finding]:
    together = {**others, one.path: record}
    first: dict[str, Callable[[], str]] = {
        "completed": lambda: _completed(record),
        "standard data": lambda: _data(record),
        "name": lambda: _name(one.path, record, results_dir, replaces),
        "seed": lambda: _seed(record),
        "commit": lambda: _commit(record, results_dir),
        "machine": lambda: _machine(record),
        "log": lambda: _log(one.log, record),
    }
    findings = [Finding(name, _problem(ask)) for name, ask in first.items()]
    problems = {finding.check: finding.problem for finding in findings}
    of_predictions = LATER
    if not problems["completed"] and not problems["standard data"]:
        of_predictions = _problem(lambda: _accuracy(one.path, record))
    findings.append(Finding("predictions", of_predictions))
    rest: dict[str, Callable[[], str]] = {
        "plausible": lambda: leaderboard.implausible(together).get(one.path, ""),
        "recipe": lambda: _recipe(together),
    }
    return findings + [Finding(name, LATER if of_predictions else _problem(ask)) for name, ask in rest.items()]


def _problem(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except UserError as error:
        return str(error)


def _completed(record: RunRecord) -> str:
    return "" if record.status == "completed" else f"the run is {record.status}; give its command again"


def _data(record: RunRecord) -> str:
    if record.data_version == proof.STANDARD and record.data_sha256 == proof.SHA256[proof.STANDARD]:
        return ""
    return f"it was made on data of version {record.data_version}; train on the data that fmbench fetches"


def _name(path: Path, record: RunRecord, results_dir: Path, replaces: bool) -> str:
    if path.name != RECORD and path.stem != record.name:
        return f"its content says {record.name}; a record must keep its name"
    there = results_dir / "runs" / f"{record.name}.json"
    if replaces or not there.exists() or store.read(there) == record:
        return ""
    return (
        f"{there} is another run's. Take a seed that is free; another machine of the same kind is told apart by "
        "--machine=NAME; `--accept --force` replaces it"
    )


def _seed(record: RunRecord) -> str:
    if not speedrun.ENTRY.fullmatch(record.entry):
        return ""
    seeds = speedrun.rule_seeds(record.config)
    if record.seed in seeds:
        return ""
    return f"{record.seed} is not of the rule's, {', '.join(map(str, seeds))}; run those"


def _commit(record: RunRecord, results_dir: Path) -> str:
    """What keeps others from the code that made a record: it must be a commit's, to the byte."""
    environment = record.environment
    dirty = [environment.git_dirty, *(process.git_dirty for process in record.processes)]
    commit = environment.git_commit
    if commit is None or None in dirty:
        return f"not known ({environment.git_unknown or 'git was not asked'}); train in a clone of the repository"
    if any(dirty):
        return "the code had changes that were not committed; commit them and run the entry again"
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        return f"'{commit:.60}' is no commit's hash; run the entry again"
    if not git.agrees(results_dir, "cat-file", "-e", f"{commit}^{{commit}}"):
        return f"{commit[:7]} is not in this clone; fetch the branch it is on (all of it: git fetch --unshallow)"
    if not git.agrees(results_dir, "merge-base", "--is-ancestor", commit, "HEAD"):
        return f"{commit[:7]} is not in the history of this branch; switch to the branch that has your code"
    if not git.agrees(results_dir, "cat-file", "-e", f"{commit}:{record.config_file}"):
        return f"{commit[:7]} has no {record.config_file}; commit the config and run the entry again"
    top = Path(git.ask(results_dir, "rev-parse", "--show-toplevel").decode().removesuffix("\n"))
    if environment.code_sha256 is None:
        return "environment.code_sha256 is not told; run the entry again with this version of fmbench"
    if environment.code_sha256 != git.code_sha256(top, commit):
        return (
            f"code_sha256 is not that of fmbench/ at {commit[:7]}; commit what the run used, modules that its "
            "config names too, to fmbench/, and run the entry again"
        )
    return ""


def _machine(record: RunRecord) -> str:
    """What is not told of the machine, without which its runs would share a table with another's."""
    environment = record.environment
    if record.mixture:
        return f"several took part ({record.mixture}); run it again, without --resume_elsewhere"
    told = {
        "cpu": environment.cpu,
        "memory_bytes": environment.memory_bytes,
        "thread_settings": environment.thread_settings is not None,
        "versions.jax": environment.versions.get("jax"),
        "instruction_sets": environment.instruction_sets or not environment.operating_system.startswith("Linux"),
        "accelerators": environment.accelerators or environment.device_platform == "cpu",
    }
    if missing := [f"environment.{field}" for field, value in told.items() if not value]:
        return f"{', '.join(missing)}: not told; run the entry again with this version of fmbench"
    return "" if record.schema_version == 2 else "schema_version is 1; results/to_schema_2.py makes it 2"


def _log(log: Path | None, record: RunRecord) -> str:
    if log is None:
        return ""
    try:
        lines = [Epoch(**json.loads(line)) for line in files.read_text(log).splitlines()]
    except (ValueError, TypeError, RecursionError):
        return f"{log} is damaged; the run's command, given again, mends it"
    if lines == record.history:
        return ""
    return f"{log} is not the history that the record has; the run's command, given again, mends it"


def _accuracy(path: Path, record: RunRecord) -> str:
    leaderboard.verify_accuracies({path: record})
    if record.val_predictions_sha256:
        store.read_val_predictions(record, path.with_suffix(".validation.npy"))
    return ""


def _recipe(records: dict[Path, RunRecord]) -> str:
    leaderboard.entries_by_condition(records)
    return ""


def cheapest(records: Sequence[RunRecord]) -> RunRecord | None:
    """The record that is soonest trained again where there are only CPUs; None, if none is of those."""
    on_cpus = [record for record in records if record.environment.device_platform == "cpu"]
    return min(on_cpus, key=lambda record: record.train_core_seconds, default=None)
