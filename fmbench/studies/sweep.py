"""A sweep: one run for each point of a grid and each seed."""

import itertools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import config_dict

from fmbench import config, entries
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import mean_and_std
from fmbench.system.interrupt import StopRequest, stop_on_signals

HOW_TO_READ = """\
Validation accuracy is the last epoch's, mean ± sample standard deviation over n seeds; train loss is the last
epoch's, too, a mean; times and epochs are medians. Test accuracy is left out on purpose: choose by validation.
"""


class Run(NamedTuple):
    """One run of the sweep."""

    point: str  # of the grid: 'optimizer.learning_rate=1e-3 batch_size=128'
    flags: list[str]  # for fmbench.main: --config and all overrides
    config: config_dict.ConfigDict

    @property
    def name(self) -> str:
        """Of its directory and log. A record's name has the device, which only the run itself looks at."""
        return f"{self.config.entry}-{self.config.dtype}-seed{self.config.seed}"


# From the command line to runs.


def plan(fixed: Sequence[str], grids: Sequence[str], seeds: str) -> list[Run]:
    """All runs of the sweep, the seeds of a grid point one after another, with configs that are checked.

    Args:
        fixed: --config and the overrides of all runs.
        grids: As in 'batch_size=128,256'.
        seeds: As in '0,1,2'.

    Raises:
        UserError: If something of it cannot be used.
    """
    if not grids:
        raise UserError("--grid is missing, as in --grid=optimizer.learning_rate=1e-3,3e-3.")
    taken = set(re.findall(r"^--?(?:no)?config\.([^=\n]+)", "\n".join(fixed), re.MULTILINE))
    axes = []
    for grid in [*grids, f"seed={seeds}"]:
        key, _, text = grid.partition("=")
        # A comma is within parentheses if a ')' comes after it before any '('.
        values = [value.strip() for value in re.split(r",(?![^(]*\))", text)]
        if not all(values):
            raise UserError(f"'{grid}' lacks a value: expected KEY=VALUE,VALUE, none of them empty.")
        if key in taken:
            way_out = "seeds are for --seeds alone" if key == "seed" else "leave one out"
            raise UserError(f"'{key}' is given twice, by --grid or --config.{key}; {way_out}.")
        taken.add(key)
        axes.append([f"{key}={value}" for value in values])
    runs: dict[str, Run] = {}
    for *point, seed in itertools.product(*axes):
        flags = [*fixed, *(f"--config.{override}" for override in [*point, seed])]
        run = Run(" ".join(point), flags, entries.from_arguments(flags))
        if run.config.data.split == "all":
            raise UserError(
                "config.data.split is 'all', which leaves no validation images to choose by; give "
                "--config.data.split=train_test_split."
            )
        if run.name in runs:
            raise UserError(f"'{runs[run.name].point} {seed}' and '{run.point} {seed}' are the same run.")
        runs[run.name] = run
    return list(runs.values())


# Training.


def train(runs: Sequence[Run], records: dict[str, RunRecord], out: Path) -> tuple[set[str], bool]:
    """Trains the runs that `records` has no end of, and prints a line for each.

    Returns:
        The names of the runs whose process failed, and whether the sweep was interrupted.

    Raises:
        UserError: If the first failed because JAX has no device, as all others would.
    """
    failed: set[str] = set()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with stop_on_signals() as stop:
        for number, run in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}] {run.point} seed={run.config.seed}: ", end="", flush=True)
            if status_of(run, records, failed) in ("completed", "diverged"):
                print(f"{_outcome(records[run.name], _log(run, out))} (trained before)", flush=True)
                continue
            workdir = out / "workdirs" / run.name
            command = [sys.executable, "-m", "fmbench.main", *run.flags]
            code = run_process([*command, f"--workdir={workdir}", f"--results_dir={out}"], _log(run, out), stop)
            if code in (0, 3):
                print(_outcome(store.read(workdir / "record.json"), _log(run, out)), flush=True)
            elif stop.signum or code == 130:
                print("interrupted", flush=True)
            else:
                failed.add(run.name)
                print(f"failed with exit code {code}, see {_log(run, out)}", flush=True)
                if len(failed) == 1:
                    _check_devices()
            if stop.signum or code == 130:
                return failed, True
    return failed, False


def run_process(command: Sequence[str], log: Path, stop: StopRequest) -> int:
    """Runs a command to its end, its output added to `log`. Returns its exit code.

    A request to stop is passed on, and the end waited for: the process has a checkpoint to save. It has a process
    group of its own, so that the terminal's Ctrl-C does not reach it, too: the second one would end it without.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
    try:
        while process.poll() is None and not stop.signum:
            time.sleep(0.1)
        if stop.signum:
            process.terminate()
        return process.wait()
    except KeyboardInterrupt:  # a second Ctrl-C
        process.kill()
        process.wait()
        raise


def _check_devices() -> None:
    """Looks whether any run can succeed; in a process of its own, for in this one JAX would keep the GPU's memory.

    Raises:
        UserError: As `system.runtime.find_devices`.
    """
    look = """
from fmbench.system import command_line, runtime
with command_line.plain_errors(""):
    runtime.find_devices()
"""
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.splitlines()[-1].removeprefix("fmbench: "))


def _log(run: Run, out: Path) -> Path:
    return out / "logs" / f"{run.name}.log"


def _outcome(record: RunRecord, log: Path) -> str:
    if record.status == "completed" and record.val_accuracy is not None:
        return f"validation {100 * record.val_accuracy:.2f} %, {record.train_seconds:.1f} s"
    return f"{record.status}, see {log}"


# From records to the table.


def read_records(runs: Sequence[Run], out: Path) -> dict[str, RunRecord]:
    """The records in `out` by the names of their runs; of several devices' the newest.

    Raises:
        UserError: If a record is damaged, or one of `runs` is there with another config.
    """
    there = sorted(store.read_all(out).values(), key=lambda record: record.created)
    records = {f"{record.entry}-{record.dtype}-seed{record.seed}": record for record in there}
    for run in runs:
        before = records[run.name].config if run.name in records else config.to_json(run.config)
        if difference := config.difference(before, config.to_json(run.config)):
            raise UserError(f"{out} holds {run.name} of another config ({difference}); name another --out.")
    return records


def status_of(run: Run, records: dict[str, RunRecord], failed: set[str]) -> str:
    """'completed', 'diverged', 'interrupted', 'failed' or 'not trained'."""
    if run.name in failed:
        return "failed"
    return records[run.name].status if run.name in records else "not trained"


def render(runs: Sequence[Run], records: dict[str, RunRecord], failed: set[str], out: Path) -> str:
    """The table in Markdown, a row for each grid point, best first, and how to read it."""
    header = ["overrides", "n", "val. accuracy, %", "train loss", "train time, s", "core-seconds", "epochs"]
    ranked = []
    for point, group in itertools.groupby(runs, key=lambda run: run.point):
        completed, others = [], []
        for run in group:
            status = status_of(run, records, failed)
            if status == "completed":
                completed.append(records[run.name])
            else:
                log = f" ({_log(run, out)})" if status in ("diverged", "failed") else ""
                others.append(f"seed {run.config.seed} {status}{log}")
        accuracies = [record.val_accuracy for record in completed if record.val_accuracy is not None]
        mean, std = mean_and_std(accuracies) if accuracies else (-1.0, None)
        numbers = ["-"] * 5
        if accuracies:
            numbers = [
                f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}",
                f"{statistics.mean(record.history[-1].train_loss for record in completed):.4f}",
                f"{statistics.median(record.train_seconds for record in completed):,.1f}",
                f"{statistics.median(record.train_core_seconds for record in completed):,.1f}",
                f"{statistics.median(record.num_epochs for record in completed):g}",
            ]
        ranked.append((mean, [point, str(len(completed)), *numbers], ", ".join(others)))
    ranked.sort(key=lambda row: -row[0])
    widths = [max(map(len, column)) for column in zip(header, *(cells for _, cells, _ in ranked), strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for cells, rest in [(header, "not completed"), (rule, "---"), *(row[1:] for row in ranked)]:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} | {rest} |")
    return "\n".join([*lines, "", HOW_TO_READ])
