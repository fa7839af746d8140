"""Checks and packs records for the committed ones; with --accept checks and places what others packed.

    python -m fmbench.submit workdirs/mlp-cpu-float32-seed0 workdirs/mlp-cpu-float32-seed1
    python -m fmbench.submit results/runs/mlp-cpu-float32-seed0.json --output=mlp.tar.gz
    python -m fmbench.submit --accept submission.tar.gz

Give the work directories of completed runs, or records' files with their predictions beside them. Of each is said
whether it holds: schema, a completed run, the standard data, its name, a seed of the rule (speed records), a
commit that this branch has and whose code is the run's to the byte, one machine that is told, a log that is the
history, the accuracy by the predictions, errors as trained nets make them, and the recipe of its row.

--accept takes a submission, asks the same again, and puts its records into <results_dir>/runs; the logs stay out,
for the records have every line of them. The rules, and what to do next, are in SUBMITTING.md.

Exit codes: 0 all holds and is written, 1 something does not hold and nothing was written, 2 something given cannot
be used.
"""

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fmbench.contributions import bundle, checks
from fmbench.errors import UserError
from fmbench.records import store
from fmbench.system import command_line
from fmbench.system.files import atomic_file

RENDER = "for page in leaderboard speedrun reproduction pareto; do python -m fmbench.$page; done"


@command_line.plain_errors("submit")
def main() -> None:
    parser = command_line.Parser("submit", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="work directory, or file of a record")
    parser.add_argument("--output", type=Path, help="the submission to write (default: submission.tar.gz)")
    parser.add_argument("--accept", type=Path, metavar="FILE", help="a submission to check and put in place")
    parser.add_argument(
        "--force", action="store_true", help="replace what is there: the file, or with --accept runs"
    )
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="in a clone (default: results)")
    arguments = parser.parse_args()
    if bool(arguments.runs) == bool(arguments.accept):
        parser.error("name runs, or give --accept=FILE")
    if arguments.accept and arguments.output:
        parser.error("--output goes with runs, not with --accept")
    if not arguments.results_dir.is_dir():
        raise UserError(f"--results_dir={arguments.results_dir} is not a directory; go to a clone of fmbench.")
    if arguments.accept:
        sys.exit(_accept(arguments.accept, arguments.results_dir, is_forced=arguments.force))
    output = arguments.output or Path("submission.tar.gz")
    if output.exists() and not arguments.force:
        raise UserError(f"{output} is there already; --force replaces it, --output=FILE names another.")
    sys.exit(_submit(arguments.runs, arguments.results_dir, output))


def _submit(runs: Sequence[Path], results_dir: Path, output: Path) -> int:
    """Exit code 0 if all holds and the submission is written, else 1."""
    checked = checks.check([checks.candidate(run) for run in runs], results_dir, replaces=False)
    if not _tell(checked):
        return 1
    records = [(one.candidate, one.record) for one in checked if one.record]
    content, names = bundle.pack(records)
    with atomic_file(output) as file:
        file.write(content)
    cheapest = checks.cheapest([record for _, record in records])
    print(f"{output}: {len(names)} files of {len(records)} run(s), {len(content):,} bytes. Next, in a clone:")
    print("  git switch -c results-of-mine    # a branch that has the commit of the code")
    print(f"  python -m fmbench.submit --accept {shlex.quote(str(output))}")
    print(f"  {RENDER}")
    print("  git add results README.md docs && git commit && git push, and open a pull request")
    if cheapest:
        print(f"Reviewers will do: python -m fmbench.verify {results_dir}/runs/{cheapest.name}.json")
    return 0


def _accept(file: Path, results_dir: Path, *, is_forced: bool) -> int:
    """Exit code 0 if all holds and the records are in place, else 1."""
    with tempfile.TemporaryDirectory() as folder:
        candidates = bundle.unpack(file, Path(folder))
        checked = checks.check(candidates, results_dir, replaces=is_forced)
        if not _tell(checked):
            return 1
        for one in checked:
            there = results_dir / "runs" / f"{one.name}.json"
            is_there = there.exists() and store.read(there) == one.record
            if not is_there:
                store.publish(one.candidate.path.with_suffix(""), results_dir)
            print(f"{there}{' is there already' if is_there else ''}")
    print(f"Next:\n  {RENDER}")
    return 0


def _tell(checked: Sequence[checks.Checked]) -> bool:
    """Prints what was found; returns whether all of it holds."""
    for one in checked:
        print(command_line.in_one_line(one.name))
        for check, problem in one.findings:
            print(command_line.in_one_line(f"  no   {check}: {problem}" if problem else f"  yes  {check}"))
    holds = all(one.holds for one in checked)
    if not holds:
        sys.stdout.flush()
        print("Nothing was written: mend what says no, and give the same command again.", file=sys.stderr)
    return holds


if __name__ == "__main__":
    main()
