"""A suite: entries with seeds, each a run, a work directory and a record."""

from collections.abc import Sequence
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
