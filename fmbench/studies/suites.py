"""A suite: entries with seeds, each a run, a work directory and a record."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import config_dict

from fmbench import config, entries
from fmbench.entries import Resources
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.records.schema import RunRecord


class Run(NamedTuple):
    """One run of a suite."""

    flags: list[str]  # for fmbench.main: --config and all overrides
    config: config_dict.ConfigDict
    resources: Resources

    @property
    def name(self) -> str:
        """Of its directory and log. A record's name has the device, which only the run itself looks at."""
        return f"{self.config.entry}-{self.config.dtype}-seed{self.config.seed}"


def plan(lines: Sequence[str]) -> list[Run]:
    """All runs of a suite, with configs that are checked.

    Args:
        lines: As run_all.sh has them: 'configs/mlp.py 0,1 --config.num_epochs=10'.

    Raises:
        UserError: If something of it cannot be used.
    """
    runs: dict[str, Run] = {}
    for line in lines:
        spec, seeds, *overrides = line.split() if len(line.split()) > 1 else (line, "")
        if not all(seed.isascii() and seed.isdigit() for seed in seeds.split(",")):
            raise UserError(f"'{line}' is no line of a suite: expected a config and its seeds, as in 'mlp 0,1,2'.")
        for seed in seeds.split(","):
            flags = [f"--config={spec}", f"--config.seed={seed}", *overrides]
            run = Run(flags, entries.from_arguments(flags), entries.resources(spec))
            if run.name in runs:
                raise UserError(f"'{line}': {run.name} is in the suite twice.")
            runs[run.name] = run
    if not runs:
        raise UserError("no entry is named: expected a config and its seeds, as in 'mlp 0,1,2'.")
    return list(runs.values())


def collect(run: Run, workdir: Path, results_dir: Path) -> bool:
    """Publishes the record of a run that is completed, and says whether it is.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        record = store.read(workdir / "record.json")
        if record.status != "completed" or not _is_of(record, run):
            return False
        store.read_predictions(record, workdir / "record.npy")
    except UserError:
        return False  # no record yet, or a damaged one: the run gives it again
    store.publish(workdir / "record", results_dir, data_dir=run.config.data.dir)
    return True


class Planned(NamedTuple):
    """An entry of a suite: what there is of it, and what is left to do."""

    entry: str
    dtype: str
    asked: list[int]  # seeds
    here: list[int]  # seeds with a record of this kind of machine, all of its cores their own
    elsewhere: list[int]  # of the others, those with a record of another kind, or of a share of the cores
    hours: float | None  # of a run, by what an epoch of the same net takes here; None if none was run

    @property
    def missing(self) -> list[int]:
        return [seed for seed in self.asked if seed not in self.here]


def progress(runs: Iterable[Run], records: Sequence[RunRecord], slug: str) -> list[Planned]:
    """What of a suite is done.

    Args:
        runs: Of the suite.
        records: All that there are; also of other epochs, for the time that one takes.
        slug: `Environment.machine_slug` of the machine that is to do the rest.
    """
    of_entry: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        of_entry.setdefault((run.config.entry, run.config.dtype), []).append(run)
    own = [record for record in records if record.environment.machine_slug == slug]
    own = [record for record in own if record.environment.shared_by is None and record.num_epochs]
    rows = []
    for (entry, dtype), same in of_entry.items():
        asked = [run.config.seed for run in same]
        done = [record for record in records if any(_is_of(record, run) for run in same)]
        here = sorted({record.seed for record in done if record in own})
        seconds = [record.wall_seconds / record.num_epochs for record in own if _costs_alike(record, same[0])]
        hours = statistics.median(seconds) * same[0].config.num_epochs / 3600 if seconds else None
        rows.append(Planned(entry, dtype, asked, here, sorted({r.seed for r in done} - set(here)), hours))
    return rows


def _costs_alike(record: RunRecord, run: Run) -> bool:
    """Whether an epoch of the two is the same work, but for how it is augmented and watched."""
    fields = ("model", "dtype", "batch_size", "features")
    recorded, wanted = config.complete(record.config), config.complete(config.to_json(run.config))
    return all(recorded.get(k) == v for k, v in wanted.items() if k.split(".")[0] in fields)


def progress_table(rows: Sequence[Planned]) -> str:
    """For people, with the sum of what is left."""
    lines = [f"{'entry':32} {'dtype':9} asked  here  elsewhere  hours a run  hours left  missing seeds"]
    for row in rows:
        of_run = "-" if row.hours is None else f"{row.hours:.2f}"
        of_all = "0.0" if not row.missing else "-" if row.hours is None else f"{row.hours * len(row.missing):.1f}"
        lines += [
            f"{row.entry:32} {row.dtype:9} {len(row.asked):5} {len(row.here):5} {len(row.elsewhere):10} "
            f"{of_run:>12} {of_all:>11}  {','.join(map(str, row.missing))}".rstrip()
        ]
    left = [row for row in rows if row.missing]
    hours = sum(row.hours * len(row.missing) for row in left if row.hours is not None)
    unknown = [row.entry for row in left if row.hours is None]
    lines += [f"{sum(len(row.missing) for row in left)} runs are left: {hours:.1f} hours, one after the other."]
    if unknown:
        lines += [
            f"Not counted, for no epoch of them was run on this kind of machine: {', '.join(unknown)}; "
            "a run with --config.num_epochs=1 leaves its time in trials/."
        ]
    return "\n".join(lines)


def why_unfinished(workdir: Path) -> str:
    """What a run that ended without a record to publish says of its end; '' if it left nothing."""
    try:
        record = store.read(workdir / "record.json")
    except UserError:
        return ""
    return f"{record.status} after epoch {record.num_epochs} of {record.config['num_epochs']}"


def _is_of(record: RunRecord, run: Run) -> bool:
    wherever = {"data.dir": None}  # the data are proven to be the same
    wanted = config.complete(config.to_json(run.config)) | wherever
    return not config.difference(config.complete(record.config) | wherever, wanted)


def meaning(status: int) -> str:
    """Of an exit status of fmbench.main."""
    known = {2: "a mistake in its config or flags", 3: "diverged", 130: "interrupted"}
    return known.get(
        status, "killed, perhaps for want of memory" if status in (-9, 137) else "see its messages above"
    )
