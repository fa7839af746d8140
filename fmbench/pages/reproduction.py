"""Renders results/reproduction.md: what the reference systems published, beside what their entries gave here.

python -m fmbench.reproduction            write it
python -m fmbench.reproduction --check    fail if it is not what the records say
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from fmbench.data import proof
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import corrected_resampled_t_test

NUM_TEST = 10_000
LEVEL = 0.05  # of the tests, two-sided
REMARK_ABOVE = 0.5  # points
NOT_APART, NOT_TESTED = "not told apart", "not tested"
DTYPES = ("float32", "bfloat16")  # runs of the first that has any count

HOW_TO_READ = f"""\
Accuracies in percent. Ours: mean ± sample standard deviation over n seeds, the last epoch's, from the
committed records of float32 runs, or, where there are none, of bfloat16 runs, which the line then says; over
folds: of the held-out images, standard deviation with ddof 0, as the reference has it. A published number is
one run's unless a spread is given; where a range is published, the difference is to its nearer end.

A difference has half of its 95 % interval behind it. Where that holds zero, the two are "not told apart", which
is less than "the same": with two or three seeds the interval is wide. A published number without a spread is
taken as one run with the spread s of our n: s² (1 + 1/n), Student's t with n - 1 degrees of freedom. Where the
published test set was not ours (the old data) or is not said, the sampling of both sets is added, with Welch's
degrees of freedom. Folds are compared with the published ones fold by fold, by Nadeau and Bengio's corrected
resampled t-test. A single run, or runs that do not differ, give no interval: "not tested". The level is
{LEVEL:g} for each line by itself: of twenty lines one is told apart by luck.

A difference of more than {REMARK_ABOVE} points that is not luck is unexplained until runs with and without a
cause have shown it. What our protocol differs in need not be one. "Adam's eps": Keras adds it before the bias
correction, we after. "Last batches": Keras trains on an epoch's last, smaller batch, too. "Other 80 %":
Kaggle's order of rows makes another split of the same random state. "Running averages": TensorFlow 1's batch
norm removed their bias towards zero.
"""


class Published(NamedTuple):
    """A number of a reference system, and the runs that are to reproduce it."""

    system: str
    net: str
    low: float  # percent
    high: float  # the same, where no range was published; infinity for "above"
    text: str  # as published
    data: str  # version it was published for
    entry: str
    stage: int = 0  # from 1: after this stage; 0: at the end
    folds: tuple[float, ...] = ()  # held-out accuracies, instead of the test accuracy; percent
    differs: str = ""  # our protocol from theirs
    comparable: bool = True  # False: shown beside each other, but not the same net
    not_run: str = ""  # why there can be no record

    @property
    def num_folds(self) -> int:
        return len(self.folds)


def _row(system: str, net: str, accuracy: float, data: str, entry: str, **fields) -> Published:
    text = fields.pop("text", f"{accuracy:.2f}")
    return Published(system, net, accuracy, accuracy, text, data, entry, **fields)


_SEED = "none but the random numbers"
_SPLIT = "which 80 % is not published"
_ADAM = "Adam's eps"
_STEPS = f"{_ADAM}, last batches"
_KAGGLE = f"new data, other 80 %, {_STEPS}"
_STEPS_TF1, _KAGGLE_TF1 = (f"{keras}, running averages" for keras in (_STEPS, _KAGGLE))
_VGG19_WEIGHTS = "not run: weights not obtainable here"
_ACCELERATOR = "not run here: needs an accelerator"

PUBLISHED = (
    _row("R0", "baseline, 5 folds", 91.187, "new", "baseline", text="91.187 ± 0.121",
         folds=(91.200, 91.217, 90.958, 91.242, 91.317), differs=_SEED),
    _row("R0", "same padding, 5 folds", 91.257, "new", "baseline-same", text="91.257 ± 0.209",
         folds=(90.875, 91.442, 91.242, 91.275, 91.450), differs=_SEED),
    _row("R0", "64 filters, 5 folds", 90.913, "new", "baseline-same64", text="90.913 ± 0.412",
         folds=(90.917, 90.908, 90.175, 91.158, 91.408), differs=_SEED),
    _row("R0", "baseline, all 60,000", 90.99, "new", "baseline", differs=_SEED),
    _row("R1", "2-conv, sigmoid", 90.0, "old", "cnn2", text="90", differs=_KAGGLE),
    Published("R2", "MLP", 89.0, 90.0, "89-90", "new", "mlp",
              differs=f"{_ADAM}; batch size not published; 1,000 chosen on validation"),
    Published("R2", "VGG-like", 94.0, math.inf, "> 94", "new", "vgg_like", differs=_ADAM),
    _row("R3", "1-conv, stage 1", 91.04, "old", "cnn1", stage=1, differs=_KAGGLE),
    _row("R3", "1-conv, stage 1", 91.2, "new", "cnn1", stage=1, text="91.2 (reported)", differs=_STEPS),
    _row("R3", "1-conv, stage 2", 92.29, "old", "cnn1", stage=2,
         differs=f"{_KAGGLE}, a cell of its notebook ran twice"),
    _row("R3", "1-conv, stage 2", 91.5, "new", "cnn1", stage=2, text="91.5 (reported)", differs=_STEPS),
    _row("R3", "3-conv, stage 1", 90.79, "old", "cnn3", stage=1, differs=_KAGGLE),
    _row("R3", "3-conv, stage 1", 90.6, "new", "cnn3", stage=1, text="90.6 (reported)", differs=_STEPS),
    _row("R3", "3-conv, stage 2", 91.17, "old", "cnn3", stage=2, differs=_KAGGLE),
    _row("R3", "3-conv, stage 2", 91.0, "new", "cnn3", stage=2, text="91.0 (reported)", differs=_STEPS),
    _row("R3", "4-conv, stage 1", 90.52, "old", "cnn4", stage=1, differs=_KAGGLE_TF1),
    _row("R3", "4-conv, stage 1", 92.7, "new", "cnn4", stage=1, text="92.7 (reported)", differs=_STEPS_TF1),
    _row("R3", "4-conv, stage 2", 93.52, "old", "cnn4", stage=2, differs=_KAGGLE_TF1),
    _row("R3", "4-conv, stage 2", 93.5, "new", "cnn4", stage=2, text="93.5 (reported)", differs=_STEPS_TF1),
    _row("R3", "VGG19 features, preprocessing bug", 76.64, "old", "transfer-vgg19-bug", not_run=_VGG19_WEIGHTS),
    _row("R3", "the same bug, EfficientNet-Lite0", 76.64, "old", "transfer-efficientnet_lite0-bug",
         text="76.64 (VGG19)", differs="another backbone; new data", comparable=False),
    _row("R3", "EfficientNet-Lite0 features", 76.64, "old", "transfer-efficientnet_lite0",
         text="76.64 (VGG19)", differs="another backbone, no bug; new data", comparable=False),
    _row("R4", "A: 128-64", 87.42, "not said", "fc-a", differs=_SPLIT),
    _row("R4", "B: 392-196-98-49", 88.65, "not said", "fc-b", differs=_SPLIT),
    Published("R4", "dense layers only, 2,391,050 parameters", 90.0, math.inf, "> 90 (claimed)", "not said",
              "mlp-best", differs="net and recipe our own"),
    _row("field", "under 100,000 parameters, 98,458", 92.5, "new", "tiny-100k", text="92.5",
         differs="net and recipe our own", comparable=False),
    _row("field", "ResNet-20, random erasing, 270,810 parameters", 95.55, "new", "resnet-20", text="95.55 ± 0.04",
         differs="200 of 300 epochs, cosine, moving average"),
    _row("field", "ResNet-18, 11,182,410 parameters", 94.9, "old", "resnet-18", text="94.9",
         differs="recipe our own; new data", not_run=_ACCELERATOR),
    _row("field", "WRN-16-4, 2,752,218 parameters", 0.0, "-", "wide_resnet-16-4", text="-",
         differs="recipe our own", not_run=_ACCELERATOR),
    _row("field", "WRN-28-10, random erasing, 36,496,858 parameters", 95.7, "new", "wide_resnet-28-10",
         text="95.7", differs="200 of 300 epochs, cosine, smoothing, moving average", not_run=_ACCELERATOR),
    _row("field", "WRN-40-4, 8,959,706 parameters", 96.6, "new", "wide_resnet-40-4", text="96.6",
         differs="CutMix for FMix and RandAugment, 400 epochs", not_run=_ACCELERATOR),
    _row("field", "pre-activation ResNet-20, width 4, 4,331,338 parameters", 95.89, "new", "preact_resnet-20-4",
         text="95.89", differs="moving average, black Cutout", not_run=_ACCELERATOR),
    _row("field", "shake-shake-26 2x96d, 26,215,514 parameters", 96.15, "new", "shake_shake-26-2x96d",
         text="96.15", differs="moving average, black Cutout, stem of 16 channels", not_run=_ACCELERATOR),
)  # fmt: skip


def files(results_dir: Path) -> dict[Path, str]:
    runs = store.read_all(results_dir).values()
    fold_runs = store.read_all(results_dir / "cross_validation").values()
    return {results_dir / "reproduction.md": render(runs, fold_runs)}


def _counts(run: RunRecord) -> bool:
    """Completed, on Fashion-MNIST, and not once more what the same seed gave alone."""
    return run.status == "completed" and not proof.is_unproven(run.data_version) and not run.trained_with


def render(runs: Iterable[RunRecord], fold_runs: Iterable[RunRecord]) -> str:
    """The page, from the records of whole runs and of folds."""
    runs, fold_runs = ([run for run in group if _counts(run)] for group in (runs, fold_runs))
    lines = [
        "# Reproduction of the reference systems",
        "",
        "Generated by `python -m fmbench.reproduction` from the records in `runs/` and `cross_validation/runs/`.",
        "",
        HOW_TO_READ,
        "| system | net | published | its data | ours | difference | | our protocol differs in |",
        "|:--|:--|--:|:--|--:|--:|:--|:--|",
    ]
    remarks = []
    for published in PUBLISHED:
        accuracies, dtype = _accuracies(published, fold_runs if published.num_folds else runs)
        name = f"{published.net} (`{published.entry}`)"
        cells = [published.system, name, published.text, published.data]
        if not accuracies:
            missing = published.not_run or _shortened(published, runs) or "not run here"
            lines.append(f"| {' | '.join([*cells, missing, '', '', published.differs])} |")
            continue
        difference, margin, verdict = compare(published, accuracies)
        ours = f"{np.mean(accuracies):.2f}"
        if len(accuracies) > 1:
            ours += f" ± {np.std(accuracies, ddof=0 if published.num_folds else 1):.2f}"
        ours += f" ({len(accuracies)})" + _unless_float32(dtype)
        apart = f"{difference:+.2f}" + ("" if margin is None else f" ± {margin:.2f}")
        compared = [apart, verdict] if published.comparable else ["", "another net"]
        lines.append(f"| {' | '.join([*cells, ours, *compared, published.differs])} |")
        if published.comparable and abs(difference) > REMARK_ABOVE and verdict != NOT_APART:
            told = f"{published.net}, {published.text} on {published.data} data: {apart}"
            remarks.append(f"- {told}, {verdict}: unexplained.")
    if remarks:
        lines += ["", f"## Differences of more than {REMARK_ABOVE} points", "", *remarks]
    return "\n".join(lines) + "\n"


def compare(published: Published, accuracies: list[float]) -> tuple[float, float | None, str]:
    """Difference of our mean from what was published, in points, and whether that is more than luck.

    Args:
        published: In percent.
        accuracies: Of our runs or folds, in percent.

    Returns:
        The difference, half its 95 % interval, and 'better', 'worse' or NOT_APART; see HOW_TO_READ. None and
        NOT_TESTED where our runs have no spread.

    References:
        Welch, 1947, "The generalization of 'Student's' problem when several different population variances are
        involved".
    """
    mean, count = float(np.mean(accuracies)), len(accuracies)
    difference = mean - min(max(mean, published.low), published.high)
    if count < 2 or np.ptp(accuracies) == 0:
        return difference, None, NOT_TESTED
    if published.folds:
        paired = corrected_resampled_t_test(published.folds, accuracies, num_train=count - 1, num_test=1)
        margin = paired.high - paired.mean
    else:
        own = float(np.var(accuracies, ddof=1)) * (1 + 1 / count)
        sets = 0.0 if published.data == "new" else 2 * mean * (100 - mean) / NUM_TEST
        freedom = (count - 1) * ((own + sets) / own) ** 2
        margin = float(stats.t(df=freedom).ppf(1 - LEVEL / 2)) * math.sqrt(own + sets)
    if abs(difference) <= margin:
        return difference, margin, NOT_APART
    return difference, margin, "better" if difference > 0 else "worse"


def _shortened(published: Published, runs: Iterable[RunRecord]) -> str:
    """What the longest run of fewer epochs came to, where the whole one was not run; '' if there is none."""
    shorter = [run for run in runs if run.entry.startswith(f"{published.entry}+num_epochs=")]
    if published.stage or published.num_folds or not shorter:
        return ""
    longest = max(shorter, key=lambda run: run.num_epochs)
    accuracy = f"{100 * (longest.test_accuracy or 0):.2f} after {longest.num_epochs} epochs"
    return f"not run to its end; {accuracy}{_unless_float32(longest.dtype)}"


def _unless_float32(dtype: str) -> str:
    return "" if dtype == "float32" else f", {dtype}"


def _accuracies(published: Published, runs: Iterable[RunRecord]) -> tuple[list[float], str]:
    """Our accuracies for it, in percent, and their dtype; none if there are no runs, or not all of the folds."""
    for dtype in DTYPES:
        if accuracies := _accuracies_in(dtype, published, runs):
            return accuracies, dtype
    return [], ""


def _accuracies_in(dtype: str, published: Published, runs: Iterable[RunRecord]) -> list[float]:
    found: dict[int, float] = {}
    for run in runs:
        if run.dtype != dtype:
            continue
        if published.num_folds:
            entry, _, fold = run.entry.partition("+fold=")
            if (
                entry == published.entry
                and run.config["data"]["num_folds"] == published.num_folds
                and not run.seed
            ):
                found[int(fold.partition("of")[0])] = 100 * (run.val_accuracy or 0)
        elif published.stage and run.entry.partition("+num_epochs=")[0] == published.entry:
            finished = {stage.name: stage for stage in run.stages}.get(f"stage{published.stage}")
            if finished and finished.num_epochs == run.config["stages"][finished.name]["num_epochs"]:
                found[run.seed] = 100 * finished.test_accuracy
        elif not published.stage and run.entry == published.entry:
            found[run.seed] = 100 * (run.test_accuracy or 0)
    if published.num_folds and len(found) < published.num_folds:
        return []
    return [found[key] for key in sorted(found)]
