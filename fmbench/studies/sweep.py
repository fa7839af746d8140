"""A sweep: one run for each point of a grid and each seed."""

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from ml_collections import config_dict

from fmbench import config, entries
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import mean_and_std
from fmbench.studies import shared_cores
from fmbench.system import interrupt
from fmbench.system.interrupt import StopRequest

NUMBER = r"([-+.\d]*\d(?:[eE][-+]?\d+)?)"
RANGE = re.compile(rf"{NUMBER}\.\.{NUMBER}(:log)?")  # '1e-4..1e-2:log'

HOW_TO_READ = """\
Validation accuracy is the last epoch's, mean ± sample standard deviation over n seeds; train loss is the last
epoch's, too, a mean; times and epochs are medians. Runs that shared the machine have no times.
Test accuracy is left out on purpose: choose by validation.
"""


class Run(NamedTuple):
    """One run of the sweep."""

    point: str  # of the grid: 'optimizer.learning_rate=1e-3 batch_size=128'
    flags: list[str]  # for fmbench.main: --config and all overrides
    config: config_dict.ConfigDict

    @property
    def title(self) -> str:
        """With the seed."""
        return f"{self.point} seed={self.config.seed}"

    @property
    def name(self) -> str:
        """Of its directory and log. A record's name has the device, which only the run itself looks at."""
        return f"{self.config.entry}-{self.config.dtype}-seed{self.config.seed}"


# From the command line to runs.


def axes_of(grids: Sequence[str], seeds: str, fixed: Sequence[str]) -> dict[str, list[str]]:
    """The values of each field of the grid, and of 'seed', as they are written.

    Args:
        grids: As in 'batch_size=128,256'.
        seeds: As in '0,1,2'.
        fixed: --config and the overrides of all runs.

    Raises:
        UserError: If values are missing, or a field is given twice.
    """
    if not grids:
        raise UserError("--grid is missing, as in --grid=optimizer.learning_rate=1e-3,3e-3.")
    taken = set(re.findall(r"^--?(?:no)?config\.([^=\n]+)", "\n".join(fixed), re.MULTILINE))
    axes = {}
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
        axes[key] = values
    return axes


def plan(fixed: Sequence[str], axes: Mapping[str, Sequence[str]]) -> list[Run]:
    """All runs of the sweep, the seeds of a grid point one after another, with configs that are checked.

    Args:
        fixed: --config and the overrides of all runs.
        axes: From `axes_of`.

    Raises:
        UserError: If something of it cannot be used; says in which combination.
    """
    entries.load(entries.split(fixed)[0].get("", ""))  # its mistakes are no combination's
    for key, values in axes.items():
        if ranges := list(filter(RANGE.fullmatch, values)):
            raise UserError(f"'{key}={ranges[0]}' is a range, which is for --sampler=tpe, by itself.")
    runs: dict[str, Run] = {}
    for values in itertools.product(*axes.values()):
        run = make_run(fixed, dict(zip(axes, values, strict=True)))
        if run.name in runs:
            raise UserError(f"'{runs[run.name].title}' and '{run.title}' are the same run.")
        runs[run.name] = run
    return list(runs.values())


def make_run(fixed: Sequence[str], values: Mapping[str, str]) -> Run:
    """The run that sets these fields, of which 'seed' is one.

    Raises:
        UserError: If they cannot be used.
    """
    point = " ".join(f"{key}={value}" for key, value in values.items() if key != "seed")
    flags = [*fixed, *(f"--config.{key}={value}" for key, value in values.items())]
    try:
        run = Run(point, flags, entries.from_arguments(flags))
    except UserError as error:
        raise UserError(f"{point} seed={values['seed']} cannot be trained: {error}") from error
    if run.config.data.split == "all":
        raise UserError(
            "config.data.split is 'all', which leaves no validation images to choose by; give "
            "--config.data.split=train_test_split."
        )
    return run


def check(runs: Sequence[Run]) -> None:
    """Lets another process set up each grid point, but for training: in this one JAX would keep the GPU's memory.

    Raises:
        UserError: If one cannot be trained on this machine; says which, and why.
    """
    look = """
import json, sys
from fmbench.system import command_line
with command_line.plain_errors("sweep"):
    from fmbench import entries
    from fmbench.training import preflight
    preflight.check({point: entries.from_arguments(flags) for point, flags in json.load(sys.stdin).items()})
"""
    points = json.dumps({run.point: run.flags for run in runs})
    done = subprocess.run([sys.executable, "-c", look], input=points, capture_output=True, text=True)
    if done.returncode:
        *_, said = ["the check of all combinations was killed.", *done.stderr.splitlines()]
        raise UserError(said.removeprefix("fmbench.sweep: "))


# Training.


class Trainer:
    """Trains runs in processes of their own, one or several at a time, and prints a line for each.

    Attributes:
        ends: What became of runs, by name, that their records don't tell: 'failed', 'pruned'.
        interrupted: Whether somebody stopped it.
    """

    def __init__(self, records: dict[str, RunRecord], out: Path, num_runs: int, jobs: int = 1) -> None:
        """Takes the records of what was trained before, and how many runs go on at a time."""
        self.ends: dict[str, str] = {}
        self.interrupted = False
        self._records, self._out, self._num_runs = records, out, num_runs
        # Alone, a run has all cores.
        self._cores = shared_cores.split_cores(jobs) if jobs > 1 else []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of what runs come next, of their numbers, and of standard output

    def train(
        self,
        runs: Iterator[Run],
        is_hopeless: Callable[[Run], bool] = lambda run: False,
        ended: Callable[[Run, RunRecord | None], None] = lambda run, record: None,
    ) -> None:
        """Trains those of `runs` that have not come to an end.

        Args:
            runs: Each is asked for when there is room for it.
            is_hopeless: Asked about a run every now and then: whether to stop it.
            ended: Told of each that came to an end, with its record; None if its process failed.
        """
        (self._out / "logs").mkdir(parents=True, exist_ok=True)
        with interrupt.stop_on_signals() as stop:
            if not self._cores:
                self._work(runs, is_hopeless, ended, stop)
                return
            with futures.ThreadPoolExecutor(len(self._cores)) as pool:
                workers = [pool.submit(self._work, runs, is_hopeless, ended, stop, own) for own in self._cores]
                try:
                    while futures.wait(workers, timeout=0.1).not_done:  # a signal is seen in between
                        pass
                except KeyboardInterrupt:  # a second Ctrl-C
                    stop.signum = signal.SIGKILL
                    raise
            for worker in workers:
                worker.result()

    def _work(
        self,
        runs: Iterator[Run],
        is_hopeless: Callable[[Run], bool],
        ended: Callable[[Run, RunRecord | None], None],
        stop: StopRequest,
        cores: Sequence[int] = (),
    ) -> None:
        """One run after another, on these cores."""
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread, and of the processes that it starts
        while not self.interrupted:
            with self._lock:
                run = next(runs, None)
                if run is None:
                    return
                head = f"[{next(self._numbers)}/{self._num_runs}] {run.title}: "
            if status_of(run, self._records, {}) in ("completed", "diverged"):
                before = self._records[run.name]
                self._say(f"{head}{_outcome(before, _log(run, self._out))} (trained before)")
                ended(run, before)
                continue
            if cores:
                self._say(f"{head}begins on cores {', '.join(map(str, cores))}")
            else:
                print(head, end="", flush=True)
            said, record = self._train(run, is_hopeless, stop)
            self._say(f"{head if cores else ''}{said}")
            if not self.interrupted or record:
                ended(run, record)

    def _train(
        self, run: Run, is_hopeless: Callable[[Run], bool], stop: StopRequest
    ) -> tuple[str, RunRecord | None]:
        """What became of a run in words, and its record if it came to an end."""
        workdir, log = workdir_of(run, self._out), _log(run, self._out)
        flags = [*run.flags, f"--workdir={workdir}", f"--results_dir={self._out}"]
        command = [sys.executable, "-m", "fmbench.main", *flags]
        environment = shared_cores.environment(len(self._cores)) if self._cores else None

        def prune() -> bool:
            if is_hopeless(run):
                self.ends[run.name] = "pruned"
            return run.name in self.ends

        code = run_process(command, log, stop, environment, prune)
        if code in (0, 3):
            self.ends.pop(run.name, None)
            record = store.read(workdir / "record.json")
            return _outcome(record, log), record
        if run.name in self.ends and code == 130 and not stop.signum:
            record = store.read(workdir / "record.json")
            return f"pruned after epoch {record.num_epochs}", record
        if stop.signum or code == 130:
            self.interrupted = True
            return "interrupted", None
        self.ends[run.name] = "failed"
        return f"failed with exit code {code}, see {log}", None

    def _say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)


def run_process(
    command: Sequence[str],
    log: Path,
    stop: StopRequest,
    environment: Mapping[str, str] | None = None,
    is_hopeless: Callable[[], bool] = lambda: False,
) -> int:
    """Runs a command to its end, its output added to `log`. Returns its exit code.

    A request to stop is passed on, and the end waited for: the process has a checkpoint to save. It has a process
    group of its own, so that the terminal's Ctrl-C does not reach it, too: the second one would end it without.
    `is_hopeless` is asked every second, and has it stopped likewise.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        for tenth in itertools.count(1):
            if process.poll() is not None or stop.signum or (tenth % 10 == 0 and is_hopeless()):
                break
            time.sleep(0.1)
        if process.poll() is None:
            process.terminate()
        while process.poll() is None:
            if stop.signum == signal.SIGKILL:
                process.kill()
            time.sleep(0.02)
        return process.returncode
    except KeyboardInterrupt:  # a second Ctrl-C
        process.kill()
        process.wait()
        raise


def workdir_of(run: Run, out: Path) -> Path:
    return out / "workdirs" / run.name


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


def status_of(run: Run, records: dict[str, RunRecord], ends: Mapping[str, str]) -> str:
    """'completed', 'diverged', 'interrupted' or 'not trained', or as `ends` has it: 'failed', 'pruned'."""
    if run.name in ends:
        return ends[run.name]
    return records[run.name].status if run.name in records else "not trained"


def render(runs: Sequence[Run], records: dict[str, RunRecord], ends: Mapping[str, str], out: Path) -> str:
    """The table in Markdown, a row for each grid point, best first, and how to read it."""
    header = ["overrides", "n", "val. accuracy, %", "train loss", "train time, s", "core-seconds", "epochs"]
    ranked = []
    for point, group in itertools.groupby(runs, key=lambda run: run.point):
        completed, others = [], []
        for run in group:
            status = status_of(run, records, ends)
            if status == "completed":
                completed.append(records[run.name])
            else:
                log = f" ({_log(run, out)})" if status in ("diverged", "failed") else ""
                others.append(f"seed {run.config.seed} {status}{log}")
        accuracies = [record.val_accuracy for record in completed if record.val_accuracy is not None]
        mean, std = mean_and_std(accuracies) if accuracies else (-1.0, None)
        numbers = ["-"] * 5
        if accuracies:
            is_timed = all(record.environment.shared_by is None for record in completed)
            numbers = [
                f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}",
                f"{statistics.mean(record.history[-1].train_loss for record in completed):.4f}",
                f"{statistics.median(record.train_seconds for record in completed):,.1f}" if is_timed else "-",
                f"{statistics.median(record.train_core_seconds for record in completed):,.1f}"
                if is_timed
                else "-",
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
