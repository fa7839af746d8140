"""The suite for an accelerator that is at hand for minutes: what is worth most first, nothing that cannot end."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import config_dict

from fmbench import api, config, entries
from fmbench.device.check import Finding, check
from fmbench.errors import UserError
from fmbench.records import machine, schema, store
from fmbench.records.schema import RunRecord
from fmbench.system import interrupt, runtime

MARGIN = 5.0  # seconds that a run may take to stop, and its checkpoint to be written
WORTH_GOING_ON = 60.0  # seconds that a long run must have to be begun or taken up again


class Entry(NamedTuple):
    """A line of the suite: an entry and how many seeds, from 0 on or, for speed records, those of the rule."""

    spec: str
    num_seeds: int
    seconds: float  # of one run on an H100, start-up and all; predicted, until a record knows better
    dtype: str = ""  # '': the config's
    is_long: bool = False  # takes several stays: stopped when the time is up, taken up again by the next

    @property
    def name(self) -> str:
        return self.spec.replace(":", "-")


BFLOAT16 = "bfloat16"
# In the order of their worth. The reference systems run as their configs say, in float32; how many bits of it a
# device multiplies, the check tells. The seconds are predicted: a third of the speed that FLOPs and least traffic
# allow (989 TFLOP/s in bfloat16, half of that in float32; 3.35 TB/s), at least 0.1 ms a step and 0.05 s an epoch,
# and 10 s for the rest.
SUITE = (
    Entry("speedrun:94", 10, 10, BFLOAT16),
    Entry("speedrun:95", 5, 11, BFLOAT16),
    Entry("speedrun:93", 5, 10, BFLOAT16),
    Entry("speedrun:94-gpu", 10, 10, BFLOAT16),
    Entry("vgg_like", 3, 20),
    Entry("mlp", 3, 16),
    Entry("cnn1", 3, 14),
    Entry("cnn3", 3, 14),
    Entry("cnn4", 3, 16),
    Entry("cnn2", 3, 14),
    Entry("fc:a", 3, 13),
    Entry("fc:b", 3, 14),
    Entry("baseline", 3, 12),
    Entry("resnet:20", 1, 39, BFLOAT16),
    Entry("resnet:18", 1, 57, BFLOAT16),
    Entry("wide_resnet:16-4", 1, 45),
    Entry("tiny:20k", 1, 16, BFLOAT16),
    Entry("tiny:50k", 1, 16, BFLOAT16),
    Entry("tiny:100k", 1, 18, BFLOAT16),
    Entry("speedrun:96", 1, 1165, is_long=True),
)


class Result(NamedTuple):
    """What came of a line of the suite."""

    entry: Entry
    ran: list[RunRecord]
    seconds: float  # that a run took, the last one, or is expected to take
    kept: int  # seeds whose records were there
    left: int  # seeds that have none yet
    why: str  # they are left
    failed: bool


class Report(NamedTuple):
    """What came of a stay at a device."""

    device: str
    findings: list[Finding]
    results: list[Result]
    interrupted: bool  # by a person


def run_in_child(sender: Connection, *arguments: Any) -> None:
    """`run` in a process of its own, which ends, with a checkpoint, if its parent does; sends what came of it."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    result: Report | BaseException
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt.WORDS)  # which its parent blocked
        result = run(*arguments)
    except (UserError, KeyboardInterrupt) as error:
        result = error
    with contextlib.suppress(BrokenPipeError):
        sender.send(result)


def run(
    suite: Sequence[Entry], overrides: Mapping[str, Any], results_dir: Path, deadline: float, checks: bool
) -> Report:
    """Checks the device, then trains what there is time for.

    Finished records of this kind of device, in `results_dir` or in the checkout's results/, are kept; unfinished
    runs lie in <results_dir>/unfinished and are taken up again.

    Args:
        suite: In the order of worth.
        overrides: Fields of all configs, for a rehearsal.
        results_dir: Where the records go.
        deadline: As `time.monotonic()` has it.
        checks: Whether to check the device first.

    Raises:
        UserError: If something that was given cannot be used.
    """
    store.check_writable(results_dir)
    runtime.set_up()
    findings = []
    for finding in check() if checks else ():
        print(finding, flush=True)
        findings.append(finding)
    slowness = 1.0  # of this device: seconds taken for each predicted one, by the last run of another entry
    results: list[Result] = []
    interrupted = False
    for entry in suite:
        result, interrupted = _run_entry(entry, overrides, results_dir, deadline, slowness)
        results.append(result)
        if result.ran:
            slowness = result.seconds / entry.seconds
        if interrupted:
            break
    return Report(machine.describe_devices(), findings, results, interrupted)


def _run_entry(
    entry: Entry, overrides: Mapping[str, Any], results_dir: Path, deadline: float, slowness: float
) -> tuple[Result, bool]:
    """Trains the seeds of an entry that have no record, and says whether a person stopped it."""
    expected = entry.seconds * slowness
    ran: list[RunRecord] = []
    kept, why, interrupted, failed = 0, "", False, False
    environment = machine.environment(ask_driver=False)
    for seed in _seeds(entry, overrides):
        own = {"seed": seed} | ({"dtype": entry.dtype} if entry.dtype else {})
        run_config = entries.resolve(entry.spec, {**overrides, **own})
        name = schema.record_name(run_config.entry, environment, run_config.dtype, seed)
        if _is_finished(name, run_config, results_dir):
            kept += 1
            continue
        left = deadline - time.monotonic() - MARGIN
        needed = WORTH_GOING_ON if entry.is_long else expected
        if left < needed:
            why = f"a run takes about {needed:,.0f} s, {max(left, 0):,.0f} s are left"
            break
        print(f"== {entry.name} seed {seed}: about {expected:,.0f} s, {left:,.0f} s are left", flush=True)
        workdir = results_dir / "unfinished" / name
        began = time.monotonic()
        timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            (record,) = api.run(run_config, workdir, results_dir)
        except Exception as error:  # one that fails must not cost the others the device
            traceback.print_exc()
            why, failed = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", True
            break
        finally:
            timer.cancel()
        if record.status == "interrupted":
            interrupted = time.monotonic() < deadline - MARGIN
            why = f"stopped after epoch {record.num_epochs} of {run_config.num_epochs}; it goes on from there"
            break
        if record.status == "diverged":
            why, failed = f"diverged in epoch {record.num_epochs + 1}", True
            break
        shutil.rmtree(workdir)
        ran.append(record)
        expected = time.monotonic() - began
    return Result(entry, ran, expected, kept, entry.num_seeds - len(ran) - kept, why, failed), interrupted


def _seeds(entry: Entry, overrides: Mapping[str, Any]) -> Sequence[int]:
    if entry.spec.startswith("speedrun:"):
        recipe = config.to_json(entries.resolve(entry.spec, overrides))
        return entries.seeds_of(recipe, entry.num_seeds)
    return range(entry.num_seeds)


def _is_finished(name: str, run_config: config_dict.ConfigDict, results_dir: Path) -> bool:
    """Whether there is a record of this run, made by a device of this kind."""
    wanted = config.complete(config.to_json(run_config)) | {"data.dir": None}
    for folder in (results_dir, config.REPOSITORY / "results"):
        path = folder / "runs" / f"{name}.json"
        record = store.read(path) if path.exists() else None
        if record and record.status == "completed":
            return not config.difference(config.complete(record.config) | {"data.dir": None}, wanted)
    return False


def markdown(report: Report, measured: Mapping[str, str], minutes: float) -> str:
    """The report as a page; `measured` says what came of each measurement."""
    lines = [f"# {report.device}", "", f"Made by `python -m fmbench.accelerator` in {minutes:.1f} minutes.", ""]
    if report.findings:
        lines += ["## The check", "", *(f"- {finding}" for finding in report.findings), ""]
    lines += ["## The suite", "", "| entry | trained now | there before | left | |", "|:--|--:|--:|--:|:--|"]
    for result in report.results:
        seconds = ", ".join(f"{record.train_seconds:.1f}" for record in result.ran)
        now = f"{len(result.ran)}: {seconds} s of training" if result.ran else "0"
        lines.append(f"| {result.entry.name} | {now} | {result.kept} | {result.left} | {result.why} |")
    if measured:
        lines += ["", "## Measurements", "", *(f"- {name}: {outcome}" for name, outcome in measured.items())]
    return "\n".join(lines) + "\n"
