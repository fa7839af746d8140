"""The summary of cross-validations: scores, and which entries differ."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmbench import config
from fmbench.data import fashion_mnist, splits
from fmbench.errors import UserError
from fmbench.pages import generated, leaderboard
from fmbench.pages.leaderboard import Condition
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import Difference, corrected_resampled_t_test, holm
from fmbench.studies.cross_validation import mean_and_population_std, protocol, score, suffix

LEVEL = 0.05  # of the tests

HOW_TO_READ = """\
Each fold of scikit-learn's `KFold(n, shuffle=True, random_state=1)` over the train images is held out once, and
scored by a model built anew, with the same seed, and trained on the others: accuracy on the held-out fold after
the last epoch, recomputed from the stored predictions. Mean ± population standard deviation (ddof 0) over the n
folds. Core-seconds are the processor time of training in all folds.

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

    @property
    def is_self_reported(self) -> bool:
        """Whether a score is but what a record says of itself."""
        return not all(map(has_provable_score, self.runs))


Summary = dict[Condition, list[CrossValidation]]


def read(results_dir: Path) -> Summary:
    """All cross-validations of `results_dir`, by condition, after a check of every accuracy in their records.

    Raises:
        UserError: If there is no such directory, a record is damaged or is not a fold's, an accuracy is not what
            the predictions give, a fold is missing, or folds cannot be compared.
    """
    if not results_dir.is_dir():
        raise UserError(f"--results_dir={results_dir} is not a directory.")
    records = store.read_all(results_dir)
    check_records(results_dir, records)
    leaderboard.verify_accuracies(records)
    verify_scores(records)
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


def has_provable_score(record: RunRecord) -> bool:
    """Whether the predictions of a fold's held-out images are stored, and their true labels to be had."""
    return record.val_predictions_sha256 is not None and not store.has_own_labels(record)


def verify_scores(records: dict[Path, RunRecord]) -> None:
    """Recomputes the score of every completed fold from its predictions of the held-out images.

    Raises:
        UserError: If one differs, or the predictions can't be had.
    """
    for path, record in records.items():
        if record.status == "completed" and has_provable_score(record):
            labels = fashion_mnist.load_once("sample" if record.data_version == "sample" else "tfds").train_labels
            data = record.config["data"]
            _, rows = splits.split(
                labels, "kfold", random_state=data["random_state"], num_folds=data["num_folds"], fold=data["fold"]
            )
            predictions = store.read_val_predictions(record, path.with_suffix(".validation.npy"))
            recomputed = float((predictions == labels[rows]).mean())
            if score(record) != recomputed:
                raise UserError(
                    f"{path}: val_accuracy is {record.val_accuracy}, but its predictions of the held-out images "
                    f"give {recomputed}; run the fold again."
                )


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
    ending = suffix(fold, num_folds)
    if not record.entry.endswith(ending) or decided != {key: there.get(key) for key in decided}:
        raise UserError(
            f"{record.name} is no record of fmbench.cross_validate, which needs a --results_dir of its own."
        )
    return record.entry.removesuffix(ending)


def check_records(results_dir: Path, records: dict[Path, RunRecord], *num_folds: int) -> None:
    """Refuses records of anything else than cross-validations over one and the same number of folds."""
    for path, record in records.items():
        _entry(record)
        if record.mixture:
            raise UserError(f"{path}: the processes that made it differ ({record.mixture}); run the fold again.")
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
    own = {"entry": None, "data.fold": None, "data.dir": None, "data.unproven": None}
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
    return sentences + _shared_outliers(rows)


def _shared_outliers(rows: Sequence[CrossValidation]) -> list[str]:
    """A sentence for each seed all of whose rows are lowest, or highest, in the same fold."""
    sentences = []
    for seed, group in itertools.groupby(sorted(rows, key=_seed), key=_seed):
        scores = [row.scores for row in group]
        for which, name in ((min, "lowest"), (max, "highest")):
            folds = {fold.index(which(fold)) + 1 for fold in scores}
            if len(scores) > 1 and len(folds) == 1:
                sentences.append(
                    f"Fold {folds.pop()} is the {name} of all {len(scores)} rows of seed {seed}, which share its "
                    f"images and the seed: one event, not {len(scores)}."
                )
    return sentences


def _seed(row: CrossValidation) -> int:
    return row.runs[0].seed


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
        parts += [f"## {generated.text(condition.title)}", _table(rows)]
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
        mark = leaderboard.code_mark(row.runs)
        mark += " †" if row.is_self_reported else ""
        mean, std = mean_and_population_std(row.scores)
        percents = [f"{100 * score:.3f}" for score in row.scores]
        cells = [
            f"{generated.link(row.label, first.config_file, '../../')}{mark}",
            f"{first.num_params:,}",
            str(len(row.runs)),
            " ".join(percents),
            f"{mean} ± {std}",
            f"{min(percents, key=float)}..{max(percents, key=float)}",
            "-" if first.environment.shared_by else f"{sum(run.train_core_seconds for run in row.runs):,.1f}",
            f"[png]({curves_file(row)})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += leaderboard.code_notes([run for row in rows for run in row.runs])
    if any(row.is_self_reported for row in rows):
        lines += [
            "",
            "† Scores are self-reported: no predictions of the held-out images are stored.",
        ]
    return "\n".join(lines)


def curves_file(row: CrossValidation) -> str:
    return f"{row.name}-learning_curves.png"
