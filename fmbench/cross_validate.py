"""Cross-validates entries over folds of the train images, and says which of them differ.

    python -m fmbench.cross_validate --config=configs/baseline.py --folds=5
    python -m fmbench.cross_validate --config=configs/baseline.py --config=configs/baseline.py:same
    python -m fmbench.cross_validate --config=configs/baseline.py --config.num_epochs=2 --config.seed=1

Each fold of scikit-learn's KFold(folds, shuffle=True, random_state=1) is held out once, in an ordinary run on the
other folds. The model is built anew in each, always with the seed config.seed; the score is the accuracy on the
held-out fold after the last epoch. Overrides are those of fmbench.main, and apply to every config.

The records go to <results_dir>/runs. What lies there becomes <results_dir>/summary.md, which also compares the
entries pair by pair, and figures: the learning curves of every entry, and box_plot.png. --render writes these
anew; --check writes nothing, and fails if summary.md is not what the records say, or an accuracy or a score not
what the stored predictions give. Older records have no predictions of the held-out images: summary.md says that
their scores are self-reported.

Stopped by Ctrl-C or SIGTERM, the same command goes on from there, in the middle of a fold too. Exit codes: 0 done,
1 --check found summary.md out of date, 2 something given cannot be used, 3 a loss diverged, 130 interrupted.
"""

import argparse
import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from fmbench import entries
from fmbench.errors import UserError
from fmbench.pages import cross_validation as page
from fmbench.pages import leaderboard
from fmbench.records import store
from fmbench.studies import cross_validation
from fmbench.system import command_line, files, runtime


@command_line.plain_errors("cross_validate", "interrupted; the same command goes on from there.")
def main() -> None:
    parser = command_line.Parser(
        "cross_validate",
        usage="%(prog)s --config=FILE [--config=FILE ...] [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="as fmbench.main takes it; may be repeated"
    )
    parser.add_argument("--folds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path("workdirs/cross_validation"),
        help="of all folds, each in its own directory there (default: workdirs/cross_validation)",
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        default=Path("results/cross_validation"),
        help="default: results/cross_validation",
    )
    parser.add_argument("--force", action="store_true", help="start anew, throwing away what was trained")
    parser.add_argument("--render", action="store_true", help="only write the summary and the figures anew")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 on a difference")
    arguments, words = parser.parse_known_args()
    if (arguments.check or arguments.render) and (arguments.config or words):
        parser.error("--check and --render look at all records; give them no --config")
    if arguments.check:
        sys.exit(_check(arguments.results_dir))
    overrides, stray = entries.split(words)
    if stray:
        parser.refuse(stray[0])
    if not arguments.render and (exit_code := _train(arguments, overrides)):
        sys.exit(exit_code)
    _write(arguments.results_dir)


def _train(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Trains all folds of all configs, or those that are not finished. Returns the exit code."""
    logging.set_verbosity(logging.ERROR)  # Orbax has much to say
    specs = arguments.config or [""]  # which is refused with the list of configs
    configs = [entries.resolve(spec, overrides) for spec in specs]
    _check_choices(arguments, overrides)
    runtime.set_up()
    for run_config in configs:
        status = cross_validation.cross_validate(
            run_config, arguments.folds, arguments.workdir, arguments.results_dir, force=arguments.force
        )
        if status != "completed":
            return {"diverged": 3, "interrupted": 130}[status]
    return 0


def _check_choices(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Refuses, before anything is trained, what the summary would refuse afterwards."""
    if arguments.folds < 2:
        raise UserError(f"--folds={arguments.folds}: at least 2 are needed.")
    if decided := sorted(overrides.keys() & cross_validation.protocol(0, arguments.folds).keys()):
        raise UserError(f"--config.{decided[0]} is decided by the cross-validation; leave it out.")
    page.check_records(arguments.results_dir, store.read_all(arguments.results_dir), arguments.folds)


def _write(results_dir: Path) -> None:
    """Writes the summary and, if Matplotlib is installed, the figures, and prints how the entries compare."""
    summary = page.read(results_dir)
    path = results_dir / "summary.md"
    try:
        with files.atomic_file(path) as file:
            file.write(page.render(summary).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error
    for condition_rows in summary.values():
        for sentence in page.comparisons(condition_rows):
            print(sentence)
    print(path)
    _draw(list(itertools.chain(*summary.values())), results_dir)


def _draw(rows: Sequence[page.CrossValidation], results_dir: Path) -> None:
    try:
        with command_line.needs_extra("figures"):
            from fmbench.pages import drawing
    except UserError as error:  # not what the folds were trained for
        print(f"fmbench.cross_validate: no figures are drawn: {error}", file=sys.stderr)
        return
    for row in rows:
        stage_ends = list(itertools.accumulate(stage.num_epochs for stage in row.runs[0].stages))[:-1]
        title = f"Learning curves of {drawing.in_words(row.entry)} over {len(row.runs)} folds\n{_where(row)}"
        folds = [f"fold {number}" for number in range(1, len(row.runs) + 1)]
        curves = drawing.learning_curves([run.history for run in row.runs], title, stage_ends, folds)
        drawing.save(curves, results_dir / page.curves_file(row))
    if rows:
        places = {_where(row) for row in rows}
        title, scores = "Accuracy on held-out folds", {}
        for row in rows:
            where = textwrap.wrap(_where(row), 40) if len(places) > 1 else []
            scores["\n".join([drawing.in_words(row.entry), *where])] = row.scores
        if len(places) == 1:
            title += f"\n{places.pop()}"
        drawing.save(drawing.box_plot(scores, title), results_dir / "box_plot.png")


def _where(row: page.CrossValidation) -> str:
    """Seed and condition, for a title."""
    return f"seed {row.runs[0].seed}, {leaderboard.condition_of(row.runs[0]).title}"


def _check(results_dir: Path) -> int:
    """Exit code 0 if summary.md is what the records say, else 1."""
    path = results_dir / "summary.md"
    summary = page.read(results_dir)
    if not path.exists() or path.read_bytes() != page.render(summary).encode():
        print(
            f"{path} is not what the records say; run python -m fmbench.cross_validate --render.", file=sys.stderr
        )
        return 1
    rows = list(itertools.chain(*summary.values()))
    reported = sum(row.is_self_reported for row in rows)
    print(
        f"{len(rows)} cross-validations agree with {path}; the scores of {len(rows) - reported} follow from their "
        f"predictions, those of {reported} are self-reported."
    )
    return 0


if __name__ == "__main__":
    main()
