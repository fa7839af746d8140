"""Cross-validates entries over folds of the train images, and says which of them differ.

    python -m fmbench.cross_validate --config=configs/baseline.py --folds=5
    python -m fmbench.cross_validate --config=configs/baseline.py --config=configs/baseline.py:same
    python -m fmbench.cross_validate --config=configs/baseline.py --config.num_epochs=2 --config.seed=1

Each fold of scikit-learn's KFold(folds, shuffle=True, random_state=1) is held out once, in an ordinary run on the
other folds. The model is built anew in each, always with the seed config.seed; the score is the accuracy on the
held-out fold after the last epoch. Overrides are those of fmbench.main, and apply to every config.

The records go to <results_dir>/runs. What lies there becomes <results_dir>/summary.md, which also compares the
entries pair by pair, and figures: the learning curves of every entry, and box_plot.png. --render writes these
anew; --check writes nothing, and fails if summary.md, an accuracy or a score is not what the records say.

Stopped by Ctrl-C or SIGTERM, the same command goes on from there, in the middle of a fold too. Exit codes: 0 done,
1 --check found summary.md out of date, 2 something given cannot be used, 3 a loss diverged, 130 interrupted.
"""

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import config_dict

from fmbench import config, leaderboard, results, runtime, train
from fmbench.errors import UserError
from fmbench.leaderboard import Condition
from fmbench.results import RunRecord
from fmbench.statistics import Difference, corrected_resampled_t_test, holm

LEVEL = 0.05  # of the tests

HOW_TO_READ = """\
Each fold of scikit-learn's `KFold(n, shuffle=True, random_state=1)` over the train images is held out once, and
scored by a model built anew, with the same seed, and trained on the others: accuracy on the held-out fold after
the last epoch. Mean ± population standard deviation (ddof 0) over the n folds. Core-seconds are the processor time
of training in all folds.

Differences are tested with Nadeau and Bengio's corrected resampled t-test (two-sided, level 0.05), which allows
for the train images that folds share. With several pairs the p-value after Holm's correction decides; the
intervals are each pair's own.
"""


class CrossValidation(NamedTuple):
    """The completed runs of one config and seed over all folds, in the order of the folds."""

    entry: str
    setting: str  # device, dtype and seed: 'cpu-float32-seed0'
    runs: list[RunRecord]

    @property
    def name(self) -> str:
        """Like a record's, without the fold."""
        return f"{self.entry}-{self.setting}"

    @property
    def label(self) -> str:
        """Entry, and the seed if it is not the usual one."""
        seed = self.runs[0].seed
        return f"{self.entry} (seed {seed})" if seed else self.entry

    @property
    def scores(self) -> list[float]:
        """Held-out accuracies."""
        return [score(run) for run in self.runs]


Summary = dict[Condition, list[CrossValidation]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmbench.cross_validate",
        usage="%(prog)s --config=FILE [--config=FILE ...] [--config.KEY=VALUE ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    arguments, overrides = parser.parse_known_args()
    if (arguments.check or arguments.render) and (arguments.config or overrides):
        parser.error("--check and --render look at all records; give them no --config")
    try:
        if arguments.check:
            sys.exit(_check(arguments.results_dir))
        if not arguments.render and (exit_code := _train(arguments, overrides)):
            sys.exit(exit_code)
        _write(arguments.results_dir)
    except UserError as error:
        print(f"fmbench.cross_validate: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # between two runs
        print("fmbench.cross_validate: interrupted; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)


# Training.


def protocol(fold: int, num_folds: int) -> dict[str, Any]:
    """What a cross-validation decides in the config of a run; `fold` counts from 0."""
    return {
        "watch": "validation",
        "data.split": "kfold",
        "data.num_folds": num_folds,
        "data.fold": fold,
        "data.random_state": 1,
    }


def fold_config(run_config: config_dict.ConfigDict, fold: int, num_folds: int) -> config_dict.ConfigDict:
    """The config of an entry's run on one fold, an entry of its own: 'baseline+fold=3of5'."""
    copy = run_config.copy_and_resolve_references()
    copy.update_from_flattened_dict(protocol(fold, num_folds))
    copy.entry += _suffix(fold, num_folds)
    return copy


def _suffix(fold: int, num_folds: int) -> str:
    return f"+fold={fold + 1}of{num_folds}"


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Trains all folds of all configs, or those that are not finished. Returns the exit code."""
    logging.set_verbosity(logging.ERROR)  # Orbax has much to say
    specs = arguments.config or [""]  # which is refused with the list of configs
    configs = [config.from_arguments([f"--config={spec}", *overrides]) for spec in specs]
    _check_choices(arguments, overrides)
    runtime.set_up()
    for run_config in configs:
        status = cross_validate(
            run_config, arguments.folds, arguments.workdir, arguments.results_dir, force=arguments.force
        )
        if status != "completed":
            return {"diverged": 3, "interrupted": 130}[status]
    return 0


def _check_choices(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuses, before anything is trained, what the summary would refuse afterwards."""
    if arguments.folds < 2:
        raise UserError(f"--folds={arguments.folds}: at least 2 are needed.")
    given = {argument.lstrip("-").partition("=")[0].removeprefix("config.") for argument in overrides}
    if decided := sorted(given & protocol(0, arguments.folds).keys()):
        raise UserError(f"--config.{decided[0]} is decided by the cross-validation; leave it out.")
    _check_records(arguments.results_dir, results.read_all(arguments.results_dir), arguments.folds)


def cross_validate(
    run_config: config_dict.ConfigDict, num_folds: int, workdir: Path, results_dir: Path, *, force: bool = False
) -> results.Status:
    """Trains and scores all folds of one config, except those that are finished, and prints the scores.

    Args:
        run_config: From `fmbench.config`. Its seed is every fold's.
        num_folds: 2 or more.
        workdir: The first of five folds is run in <workdir>/<name>/fold1of5, with the name of a record.
        results_dir: The records go to <results_dir>/runs.
        force: Start anew, throwing away what `workdir` holds of this config.

    Returns:
        'completed', or why the first fold that was not did not complete.

    Raises:
        UserError: If something that was given cannot be used.
    """
    name = results.record_name(run_config.entry, results.environment(), run_config.dtype, run_config.seed)
    print(f"{run_config.entry} seed {run_config.seed}", flush=True)
    scores = []
    for fold in range(num_folds):
        record = train.train_and_evaluate(
            fold_config(run_config, fold, num_folds),
            workdir / name / f"fold{fold + 1}of{num_folds}",
            results_dir=results_dir,
            force=force,
        )
        if record.status != "completed":
            return record.status
        scores.append(score(record))
        print(f"fold {fold + 1}/{num_folds}: {100 * scores[-1]:.3f} %", flush=True)
    mean, std = _mean_and_std(scores)
    print(f"mean {mean} % ± {std} (n={num_folds})", flush=True)
    return "completed"


# From records to the summary.


def score(record: RunRecord) -> float:
    """The score of a fold: the accuracy on the held-out images after the last epoch.

    Raises:
        UserError: If the record and its history differ on it.
    """
    if record.val_accuracy is None or record.val_accuracy != record.history[-1].val_accuracy:
        raise UserError(
            f"{record.name}: val_accuracy is {record.val_accuracy}, but that of the last epoch "
            f"{record.history[-1].val_accuracy}; run the fold again."
        )
    return record.val_accuracy


def read(results_dir: Path) -> Summary:
    """All cross-validations of `results_dir`, by condition, after a check of every accuracy in their records.

    Raises:
        UserError: If there is no such directory, a record is damaged or is not a fold's, an accuracy is not what
            the predictions give, a fold is missing, or folds cannot be compared.
    """
    if not results_dir.is_dir():
        raise UserError(f"--results_dir={results_dir} is not a directory.")
    records = results.read_all(results_dir)
    _check_records(results_dir, records)
    leaderboard.verify_accuracies(records)
    groups = defaultdict(list)
    for record in records.values():
        groups[_entry(record), record.name.removeprefix(f"{record.entry}-")].append(record)
    summary: Summary = defaultdict(list)
    for (entry, setting), runs in groups.items():
        runs.sort(key=lambda run: run.config["data"]["fold"])
        row = CrossValidation(entry, setting, runs)
        _check_folds(row)
        summary[leaderboard.condition_of(runs[0])].append(row)
    for rows in summary.values():
        rows.sort(key=lambda row: (row.entry, row.runs[0].seed))
    return dict(sorted(summary.items()))


def _num_folds(record: RunRecord) -> int:
    return record.config["data"].get("num_folds", 0)


def _entry(record: RunRecord) -> str:
    """The entry that a run is a fold of.

    Raises:
        UserError: If it is none.
    """
    fold, num_folds = record.config["data"].get("fold", 0), _num_folds(record)
    decided = protocol(fold, num_folds)
    there = config.flatten(record.config)
    suffix = _suffix(fold, num_folds)
    if not record.entry.endswith(suffix) or decided != {key: there.get(key) for key in decided}:
        raise UserError(
            f"{record.name} is no record of fmbench.cross_validate, which needs a --results_dir of its own."
        )
    return record.entry.removesuffix(suffix)


def _check_records(results_dir: Path, records: dict[Path, RunRecord], *num_folds: int) -> None:
    """Refuses records of anything else than cross-validations over one and the same number of folds."""
    for record in records.values():
        _entry(record)
    numbers = {*num_folds, *map(_num_folds, records.values())}
    if len(numbers) > 1:
        raise UserError(
            f"--results_dir={results_dir}: scores over {' and '.join(map(str, sorted(numbers)))} folds cannot be "
            "compared; give each number of folds a directory of its own."
        )


def _check_folds(row: CrossValidation) -> None:
    """Refuses folds of different configs or made under different conditions, and looks for missing ones."""
    first = row.runs[0]
    for run in row.runs:
        if difference := config.difference(_shared(first), _shared(run)):
            raise UserError(
                f"{first.name} and {run.name} are no folds of one cross-validation ({difference}). "
                "Run the older one again."
            )
    completed = {run.config["data"]["fold"] for run in row.runs if run.status == "completed"}
    missing = [str(fold + 1) for fold in range(_num_folds(first)) if fold not in completed]
    if missing:
        raise UserError(
            f"{row.name} cannot be compared: no completed record of fold {', '.join(missing)} of "
            f"{_num_folds(first)}. Cross-validate {first.config_file} again to complete it, or delete the records "
            "of its other folds."
        )


def _shared(run: RunRecord) -> dict[str, Any]:
    """What all folds must share: the config but for the fold and the data's place, the model, the condition."""
    own = {"entry": None, "data.fold": None, "data.dir": None}
    condition = leaderboard.condition_of(run).title
    return config.complete(run.config) | own | {"num_params": run.num_params, "condition": condition}


def compare(a: CrossValidation, b: CrossValidation) -> Difference:
    """The test of b's scores minus a's, over the same folds."""
    num_test = sum(run.num_validation for run in a.runs)
    num_train = sum(run.num_train for run in a.runs)
    return corrected_resampled_t_test(a.scores, b.scores, num_train=num_train, num_test=num_test)


def comparisons(rows: Sequence[CrossValidation]) -> list[str]:
    """A sentence for each pair of cross-validations under one condition, which saw the same folds."""
    pairs = list(itertools.combinations(rows, 2))
    differences = [compare(a, b) for a, b in pairs]
    corrected = holm([difference.p_value for difference in differences])
    sentences = []
    for (a, b), difference, p_value in zip(pairs, differences, corrected, strict=True):
        mean, low, high = (f"{100 * value:+.2f}" for value in difference[:3])
        p_text = _p_text(difference.p_value)
        if len(pairs) > 1:
            p_text += f", {_p_text(p_value)} with Holm's correction for {len(pairs)} pairs"
        if p_value < LEVEL:
            verdict = "the difference is real"
        else:
            verdict = f"the {len(a.runs)} folds cannot tell them apart"
        sentences.append(
            f"{b.label} minus {a.label}: {mean} points, 95 % interval {low}..{high}, {p_text}: {verdict}."
        )
    return sentences


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def render(summary: Summary) -> str:
    """What belongs in summary.md."""
    parts = [
        "# Cross-validation",
        "Generated by `python -m fmbench.cross_validate` from `runs/`.",
        HOW_TO_READ.strip(),
    ]
    for condition, rows in summary.items():
        parts += [f"## {condition.title}", _table(rows)]
        if sentences := comparisons(rows):
            parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    if summary:
        parts.append("![Scores of all folds](box_plot.png)")
    else:
        parts.append("No records yet: `python -m fmbench.cross_validate --config=configs/baseline.py`.")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[CrossValidation]) -> str:
    lines = [
        "| entry | params | n | fold scores, % | mean ± std, % | min..max, % | core-seconds | curves |",
        "|:--|--:|--:|:--|--:|--:|--:|:--|",
    ]
    for row in rows:
        first = row.runs[0]
        mark = "" if all(run.environment.git_dirty is False for run in row.runs) else " \\*"
        mean, std = _mean_and_std(row.scores)
        percents = [f"{100 * score:.3f}" for score in row.scores]
        cells = [
            f"[{row.label}](../../{first.config_file}){mark}",
            f"{first.num_params:,}",
            str(len(row.runs)),
            " ".join(percents),
            f"{mean} ± {std}",
            f"{min(percents, key=float)}..{max(percents, key=float)}",
            f"{sum(run.train_core_seconds for run in row.runs):,.1f}",
            f"[png]({_curves_file(row)})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if any(run.environment.git_dirty is not False for row in rows for run in row.runs):
        lines += ["", "\\* Trained from code that is not exactly a commit."]
    return "\n".join(lines)


def _mean_and_std(scores: Sequence[float]) -> tuple[str, str]:
    """Mean and population standard deviation, as the reference's harness has them, in percent."""
    return f"{100 * np.mean(scores):.3f}", f"{100 * np.std(scores):.3f}"


def _curves_file(row: CrossValidation) -> str:
    return f"{row.name}-learning_curves.png"


def _write(results_dir: Path) -> None:
    """Writes the summary and the figures, and prints how the entries compare."""
    from fmbench import figures  # takes a second to import

    summary = read(results_dir)
    path = results_dir / "summary.md"
    try:
        with results.atomic_file(path) as file:
            file.write(render(summary).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error
    rows = list(itertools.chain(*summary.values()))
    for row in rows:
        stage_ends = list(itertools.accumulate(stage.num_epochs for stage in row.runs[0].stages))[:-1]
        title = f"{row.entry}\n{row.setting}, {len(row.runs)} folds"
        curves = figures.learning_curves([run.history for run in row.runs], title, stage_ends)
        figures.save(curves, results_dir / _curves_file(row))
    if rows:
        scores = {f"{row.entry}\n{row.setting}": row.scores for row in rows}
        figures.save(figures.box_plot(scores, "Accuracy on held-out folds"), results_dir / "box_plot.png")
    for condition_rows in summary.values():
        for sentence in comparisons(condition_rows):
            print(sentence)
    print(path)


def _check(results_dir: Path) -> int:
    """Exit code 0 if summary.md is what the records say, else 1."""
    path = results_dir / "summary.md"
    summary = read(results_dir)
    if not path.exists() or path.read_bytes() != render(summary).encode():
        print(
            f"{path} is not what the records say; run python -m fmbench.cross_validate --render.", file=sys.stderr
        )
        return 1
    print(f"{sum(map(len, summary.values()))} cross-validations agree with their predictions and with {path}.")
    return 0


if __name__ == "__main__":
    main()
