"""The runs of a suite as jobs of SLURM, submitted through submitit.

What a job is to do, submitit pickles, and unpickles on the node: a `Task`, which is a command line and nothing
else. The file lies in this user's own folder, written by the process that submits and by the job itself, and
whoever could put another one there could as well change the code. What submitit pickles of a job's end is never
read: what became of a run, its work directory says, in plain files; what becomes of it, `squeue` does.

A run's work directory is known before its machine is, so that a job that is preempted, cancelled, out of time, or
on a node that fails goes on where it was, in the same job or in the next one.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from fmbench.errors import UserError
from fmbench.studies import suites
from fmbench.studies.suites import Run
from fmbench.system import command_line, files, interrupt

FOLDER = Path("workdirs") / "slurm"  # work directories, submitit's files and logs, and which run is which job
MOST_REQUEUES = 1000  # of a job whose time is up: each goes on where the one before was
POLL = 5.0  # seconds between two looks
LINGER = 20.0  # seconds that a file may take from one machine to another
TIMEOUT = 60.0  # seconds for SLURM's commands
HOW_TO_CHOOSE = "SBATCH_PARTITION, SBATCH_ACCOUNT and sbatch's other variables choose otherwise."


class Job(NamedTuple):
    """A job as the queue has it."""

    state: str  # 'RUNNING', 'PENDING', 'COMPLETING', ...
    elapsed: str = ""  # '1-02:03:04', '3:04'
    where: str = ""  # its node, or why it waits


class Task:
    """What a job does: runs a command, and lets it end with a checkpoint when SLURM wants the node back."""

    def __init__(self, command: Sequence[str]) -> None:
        """Takes the words of the command."""
        self.command = list(command)
        self._child: int | None = None  # its process

    def __call__(self) -> None:
        """Runs the command to its end, with whose exit status the job ends, too."""
        with subprocess.Popen(self.command, preexec_fn=_ignore_notice) as child:
            self._child = child.pid
            _wait_for(child.pid)
        if child.returncode == 130 and _is_running():  # preempted: asked to end, and not by scancel
            subprocess.run(["scontrol", "requeue", _own_job()], timeout=TIMEOUT, check=True)
        sys.exit(child.returncode)

    def checkpoint(self) -> Any:
        """Submitit's question, when time is nearly up, what the job is to do when it is queued again: the same.

        It comes in a signal handler, in the middle of `__call__`.
        """
        from submitit.helpers import DelayedSubmission

        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)
            _wait_for(self._child)
        return DelayedSubmission(Task(self.command))


def _wait_for(pid: int) -> None:
    """Waits for the end of a child, and leaves it to be waited for again."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _ignore_notice() -> None:
    """SLURM sends its notice to all processes of a job; the command gets SIGTERM instead."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _own_job() -> str:
    """The id of the job that this process is in. SLURM_JOB_ID alone may stand for the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _is_running() -> bool:
    """Whether SLURM has this job for a running one: it is neither cancelled nor queued again already."""
    asked = ["squeue", "--noheader", "--format=%T", f"--jobs={_own_job()}"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout.strip() == "RUNNING"


# Submission.


def submit(runs: Sequence[Run], results_dir: Path, max_jobs: int | None, *, force: bool) -> dict[str, str]:
    """Submits the runs that have no record and no job, in an array for each number of CPUs and GPUs asked for.

    Args:
        runs: Of the suite.
        results_dir: Where the records go.
        max_jobs: Of an array at a time; None: as many as there is room for.
        force: Whether to begin all anew.

    Returns:
        The jobs of the runs that are left, by the runs' names: '12_3'.

    Raises:
        UserError: If SLURM or submitit is not at hand, or refuses the jobs.
    """
    if not shutil.which("sbatch"):
        raise UserError("--launcher=slurm: there is no sbatch here; submit from a machine of the cluster.")
    with command_line.needs_extra("slurm"):
        import submitit
        from submitit.core import utils
    jobs = FOLDER / "jobs.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Signals wait: a job that is submitted and not written down would be submitted again.
    with filelock.FileLock(FOLDER / ".lock"), interrupt.blocked():
        queued = queue()
        try:
            known = files.read_json(jobs) if jobs.exists() else {}
        except ValueError as error:
            raise UserError(f"{jobs} {error}; `scancel --name=fmbench` ends its jobs, then remove it.") from error
        known = {name: job for name, job in known.items() if job in queued}
        if force:
            _clear(runs, known)
        left = [run for run in runs if not suites.collect(run, workdir(run), results_dir)]
        new = sorted((run for run in left if run.name not in known), key=_nodes)
        for (cpus, gpus), group in itertools.groupby(new, _nodes):
            array = list(group)
            executor = submitit.SlurmExecutor(FOLDER / "jobs", max_num_timeout=MOST_REQUEUES)
            executor.update_parameters(
                job_name="fmbench",
                time=max(run.resources.minutes for run in array),
                cpus_per_task=cpus,
                srun_args=[f"--cpus-per-task={cpus}"],  # which since SLURM 22.05 srun does not take from sbatch
                array_parallelism=max_jobs or len(array),
                **({"gpus_per_node": gpus} if gpus else {}),
            )
            try:
                with contextlib.redirect_stderr(io.StringIO()), executor.batch():
                    submitted = [executor.submit(Task(_command(run, results_dir))) for run in array]
            except utils.FailedJobError as error:
                for task in (FOLDER / "jobs").glob("?" * 32 + ".pkl"):  # of no job
                    task.unlink()
                found = re.findall(r"^\s*sbatch: error: (.*)$", str(error), re.MULTILINE) or ["no reason given"]
                raise UserError(f"sbatch refuses the jobs: {'; '.join(found)}. {HOW_TO_CHOOSE}") from error
            known |= {run.name: job.job_id for run, job in zip(array, submitted, strict=True)}
            with files.atomic_file(jobs) as file:
                file.write(json.dumps(known, indent=1).encode())
    return {run.name: known[run.name] for run in left}


def workdir(run: Run) -> Path:
    """Of a run, wherever it runs."""
    return FOLDER / run.name


def _nodes(run: Run) -> tuple[int, int]:
    """What nodes a run needs."""
    return run.resources.cpus, run.resources.gpus


def _command(run: Run, results_dir: Path) -> list[str]:
    flags = [f"--workdir={workdir(run).absolute()}", f"--results_dir={results_dir.absolute()}"]
    return [sys.executable, "-m", "fmbench.main", *run.flags, *flags]


def _clear(runs: Sequence[Run], jobs: Mapping[str, str]) -> None:
    for run in runs:
        if run.name in jobs:
            raise UserError(f"--force: {run.name} is in the queue; `scancel {jobs[run.name]}` first.")
    for run in runs:
        files.remove(workdir(run))


# Waiting.


def queue() -> dict[str, Job]:
    """This user's jobs by their ids, '12' or '12_3'.

    Raises:
        UserError: If SLURM does not answer.
    """
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i|%T|%M|%R"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue does not answer ({error}).") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"squeue does not answer ({last}).")
    lines = (line.split("|", 3) for line in done.stdout.splitlines())
    return {job: Job(state, elapsed, where.replace("(None)", "")) for job, state, elapsed, where in lines}


def watch(runs: Sequence[Run], jobs: Mapping[str, str], results_dir: Path) -> dict[str, str]:
    """Waits for the jobs, and shows what they do.

    Args:
        runs: Of the suite.
        jobs: From `submit`.
        results_dir: Where the records go.

    Returns:
        What became of the runs that ended without a record, by name.
    """
    waiting = {run.name: run for run in runs if run.name in jobs}
    rows = {name: Row(run, jobs[name]) for name, run in waiting.items()}
    table = _Table(len(runs) - len(waiting))
    failed: dict[str, str] = {}
    gone: dict[str, float] = {}  # since when a run's job is not in the queue
    while waiting:
        try:
            queued = queue()
        except UserError as error:  # of a controller that restarts, perhaps
            table.say(f"{error} Asking again.")
            time.sleep(POLL)
            continue
        for name, run in list(waiting.items()):
            job = queued.get(jobs[name])
            if job:
                gone.pop(name, None)
            elif suites.collect(run, workdir(run), results_dir):
                job = Job("DONE")
            elif time.monotonic() - gone.setdefault(name, time.monotonic()) > LINGER:
                failed[name] = _describe_end(run, jobs[name])
                job = Job("FAILED")
            rows[name] = rows[name]._replace(job=job or Job("ENDED"))
            if rows[name].job.state in ("DONE", "FAILED"):
                del waiting[name]
        table.show(list(rows.values()))
        if waiting:
            time.sleep(POLL)
    return failed


def _describe_end(run: Run, job: str) -> str:
    log = FOLDER / "jobs" / f"{job}_0_log.err"
    return f"{suites.why_unfinished(workdir(run)) or 'ended without a record'}; see {log}"


class Row(NamedTuple):
    """A run in the table, and its job as it was seen last."""

    run: Run
    job_id: str
    job: Job = Job("")

    def __str__(self) -> str:
        config, job = self.run.config, self.job
        what = f"{config.entry:<24} {config.seed:>5}"
        return f"{what}  {self.job_id:<10} {job.state:<11} {job.elapsed:>10}  {job.where}"


class _Table:
    """What runs: in a terminal drawn anew, with the running ones first; elsewhere a line for each change."""

    HEAD = f"{'entry':<24} {'seed':>5}  {'job':<10} {'state':<11} {'elapsed':>10}  where, or why not"

    def __init__(self, num_before: int) -> None:
        """Takes the number of runs that were done before."""
        self._num_before = num_before
        self._num_drawn = 0  # lines in the terminal, which the next ones replace
        self._states: dict[str, str] = {}

    def say(self, line: str) -> None:
        """Prints a line that is to stay."""
        print(line, file=sys.stderr, flush=True)
        self._num_drawn = 0

    def show(self, rows: Sequence[Row]) -> None:
        """Shows them as they are now."""
        if sys.stdout.isatty():
            self._draw(rows)
            return
        if not self._states:
            print(self.HEAD)
        for row in rows:
            if row.job.state != self._states.get(row.run.name):
                print(row, flush=True)
        self._states = {row.run.name: row.job.state for row in rows}

    def _draw(self, rows: Sequence[Row]) -> None:
        size = shutil.get_terminal_size()
        left = sorted((row for row in rows if row.job.state != "DONE"), key=lambda row: row.job.state != "RUNNING")
        numbers = Counter(row.job.state.lower() for row in rows)
        numbers["done"] += self._num_before
        lines = [self.HEAD, *map(str, left[: max(1, size.lines - 4)])]
        lines.append(", ".join(f"{number} {state}" for state, number in sorted(numbers.items())))
        up = f"\033[{self._num_drawn}F\033[J" if self._num_drawn else ""
        print(up + "\n".join(line[: size.columns - 1] for line in lines), flush=True)
        self._num_drawn = len(lines)
