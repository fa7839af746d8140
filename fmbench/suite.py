"""Trains many runs at a time: as jobs of SLURM, or on shares of this machine's cores.

    python -m fmbench.suite --launcher=slurm --max_jobs=8 'mlp 0,1,2' 'cnn1 0 --config.num_epochs=10'
    python -m fmbench.suite --launcher=local --jobs=4 'mlp 0,1,2,3'
    python -m fmbench.suite --plan 'mlp 0,1,2,3' 'cnn4 0,1,2'

An ENTRY is as a line of run_all.sh's suites: a config, its seeds, and what is set otherwise. run_all.sh hands its
suites over in this way. Runs that have their record are not made again; after Ctrl-C, or when jobs were cancelled,
the same command goes on with what is left.

--launcher=slurm submits a job for each run, through submitit (pip install 'fmbench[slurm]'), with the CPUs, GPUs
and minutes that RESOURCES in the config's file asks for; all else, sbatch's variables say: SBATCH_PARTITION,
SBATCH_ACCOUNT, SBATCH_CONSTRAINT, ... A job whose time is up, or that is preempted, queues again and goes on from
its checkpoint. Ctrl-C leaves the jobs alone, and the same command shows them again.

--launcher=local gives each of N runs as many cores of its own. Their records say that they shared the machine:
they count for accuracy and are no timings.

--plan trains nothing: it says which seeds have a record of this kind of machine, all of its cores their own, and
how many hours the others will take, by what an epoch of the same net took here, in --results_dir or in trials/.

Exit codes: 0 all have their record, 1 a run failed (the others were still made), 2 something given cannot be used,
130 or 143 interrupted.
"""

import argparse
import sys
from pathlib import Path

from fmbench.errors import UserError, nearest
from fmbench.system import command_line

# What takes JAX is imported in the functions: help, and the answer to a mistake, should not wait for it.

LAUNCHERS = ("slurm", "local")


def main() -> None:
    parser = command_line.Parser(
        "suite",
        usage="%(prog)s --launcher=slurm|local|--plan [options] ENTRY ...",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help="'CONFIG SEED,SEED --config.KEY=VALUE ...'")
    parser.add_argument("--launcher", metavar="NAME", help="slurm or local")
    parser.add_argument("--plan", action="store_true", help="say what is left and how long it takes, and stop")
    parser.add_argument(
        "--max_jobs", type=int, metavar="N", help="slurm: jobs of an array at a time (default: all)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="local: runs at a time")
    parser.add_argument(
        "--results_dir", type=Path, default=Path("results"), help="of the records (default: results)"
    )
    parser.add_argument("--force", action="store_true", help="train all anew")
    with command_line.plain_errors("suite", "interrupted; the same command goes on."):
        arguments = parser.parse_args()
        if arguments.plan:
            _show_plan(arguments)
            return
        _check(arguments)
        failed = _run_jobs(arguments) if arguments.launcher == "slurm" else _share_cores(arguments)
        for name, why in failed.items():
            print(f"fmbench.suite: {name} failed: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.launcher not in LAUNCHERS:
        given = f"no launcher '{arguments.launcher}'" if arguments.launcher is not None else "no --launcher"
        raise UserError(
            f"there is {given}{nearest(arguments.launcher or '', LAUNCHERS)}; expected slurm or local."
        )
    for flag, launcher in (("max_jobs", "slurm"), ("jobs", "local")):
        number = getattr(arguments, flag)
        if number is not None and arguments.launcher != launcher:
            raise UserError(f"--{flag} is for --launcher={launcher}.")
        if number is not None and number < 1:
            raise UserError(f"--{flag}={number}: it must be at least 1.")
    if arguments.launcher == "local" and arguments.jobs is None:
        raise UserError("--launcher=local needs --jobs=N, the number of runs at a time.")


def _show_plan(arguments: argparse.Namespace) -> None:
    from fmbench.records import machine, store
    from fmbench.studies import suites

    runs = suites.plan(arguments.entries)
    folders = dict.fromkeys([arguments.results_dir, Path("trials")])
    records = [record for folder in folders for record in store.read_all(folder).values()]
    slug = machine.environment(ask_driver=False).machine_slug
    print(suites.progress_table(suites.progress(runs, records, slug)))


def _run_jobs(arguments: argparse.Namespace) -> dict[str, str]:
    """Submits to SLURM and waits; returns what failed, and why."""
    from fmbench.records import store
    from fmbench.studies import slurm, suites

    runs = suites.plan(arguments.entries)
    store.check_writable(arguments.results_dir)
    jobs = slurm.submit(runs, arguments.results_dir, arguments.max_jobs, force=arguments.force)
    print(f"{len(runs)} runs: {len(runs) - len(jobs)} have their record, {len(jobs)} are jobs.", flush=True)
    arrays = " ".join(dict.fromkeys(job.partition("_")[0] for job in jobs.values()))
    try:
        failed = slurm.watch(runs, jobs, arguments.results_dir)
    except KeyboardInterrupt:
        print(
            f"The jobs go on; the same command shows them again, `scancel {arrays}` ends them with a checkpoint.",
            file=sys.stderr,
        )
        raise
    print(f"{len(runs) - len(failed)} of {len(runs)} runs have their record in {arguments.results_dir}/runs.")
    return failed


def _share_cores(arguments: argparse.Namespace) -> dict[str, str]:
    """Trains on this machine; returns what failed, and why."""
    from fmbench.records import store
    from fmbench.studies import shared_cores, suites

    cores = shared_cores.split_cores(arguments.jobs)
    runs = suites.plan(arguments.entries)
    store.check_writable(arguments.results_dir)
    pool = shared_cores.Pool(runs, cores, arguments.results_dir, force=arguments.force)
    pool.train()
    return {name: f"exit status {status}, {suites.meaning(status)}." for name, status in pool.failed.items()}


if __name__ == "__main__":
    main()
