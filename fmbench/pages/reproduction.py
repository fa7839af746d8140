"""What the reference systems published, beside what their entries gave here and their controls today."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from fmbench.data import proof
from fmbench.pages import audit, leaderboard
from fmbench.records import controls, store
from fmbench.records.controls import ControlRecord
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import corrected_resampled_t_test, welch_t_test

NUM_TEST = 10_000
LEVEL = 0.05  # of the tests, two-sided
REMARK_ABOVE, EQUIVALENT = 0.5, 0.3  # points
NOT_APART, NOT_TESTED = "not told apart", "not tested"
DTYPES = ("float32", "bfloat16")  # runs of the first that has any count

SYSTEMS = """\
- R0: one convolution and its five folds, in Keras. J. Brownlee, [How to Develop a CNN From Scratch for
  Fashion-MNIST Clothing Classification][R0].
- R1: two convolutions, from Kaggle's CSV files, in Keras. One of many notebooks like it; we know no address of it.
- R2: the MLP 256-512-100-10 and the VGG-like net, in Keras. We know no address.
- R3: one, three and four convolutions, and VGG19's features, in Keras, on the old data. J. Le,
  [khanhnamle1994/fashion-mnist](https://github.com/khanhnamle1994/fashion-mnist).
- R3n: the nets after which R3's are made, on the new data. D. Khosravi,
  [DanialK/fashion-mnist-cnn](https://github.com/DanialK/fashion-mnist-cnn). Its first stage has 20 epochs of
  batches of 512, the last ten meant to be slower, its three convolutions have dropout rates of 0.2, its four
  convolutions pool once and see standardised images: they stand beside our entries for R3's nets, not compared.
- R4: dense layers, in PyTorch. We know no address.
- field: others' results; our entries are no reproductions of theirs, but for the nets.

[R0]: https://machinelearningmastery.com/\
how-to-develop-a-cnn-from-scratch-for-fashion-mnist-clothing-classification/"""

HOW_TO_READ = f"""\
Accuracies in percent. Ours: mean ± sample standard deviation over n seeds, the last epoch's, from the
committed records of float32 runs, or, where there are none, of bfloat16 runs, which the line then says; over
folds: of the held-out images, standard deviation with ddof 0, as the reference has it; where there are several
seeds, of each fold's mean over them. A published number is one run's unless a spread is given; where a range is
published, the difference is to its nearer end.

A difference has half of its 95 % interval behind it. Where that holds zero, the two are "not told apart", which
is less than "the same": with two or three seeds the interval is wide. A published number without a spread is
taken as one run with the spread s of our n: s² (1 + 1/n), Student's t with n - 1 degrees of freedom. Where the
published test set was not ours (the old data) or is not said, the sampling of both sets is added, with Welch's
degrees of freedom. Folds are compared with the published ones fold by fold, by Nadeau and Bengio's corrected
resampled t-test. A single run, or runs that do not differ, give no interval: "not tested". The level is
{LEVEL:g} for each line by itself: of twenty lines one is told apart by luck.

Published numbers are old draws. A *control* is the reference's net trained today in its own framework, by that
framework's own `fit`, optimizer and initial values, on the standard data, split and epochs of our entry:
`python -m fmbench.reproduction --controls=keras,torch` trains them, and their records, with predictions, lie in
`controls/`. Ours minus the control is Welch's t-test over seeds, and over folds the one above. "Equivalent" means
that the two one-sided tests hold: at the level {LEVEL:g} the difference is less than {EQUIVALENT} points.

A difference of more than {REMARK_ABOVE} points from what was published, that is not luck, is unexplained until
runs with and without a cause have shown it; a control that agrees with ours shows that the cause is not ours. What
our protocol differs in need not be one. "Adam's eps": Keras adds it before the bias correction, we after. "Last
batch": in stage 2 Keras's generator draws 187 batches an epoch, where our entry has half a batch more. "Other
80 %": Kaggle's order of rows makes another split of the same random state. "Running averages": TensorFlow 1's
batch norm removed their bias towards zero.
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
    another: str = ""  # net or protocol: shown beside each other, but not compared
    not_run: str = ""  # why there can be no record


def _row(system: str, net: str, accuracy: float, data: str, entry: str, **fields) -> Published:
    text = fields.pop("text", f"{accuracy:.2f}")
    return Published(system, net, accuracy, accuracy, text, data, entry, **fields)


_SEED = "none but the random numbers"
_SPLIT = "which 80 % is not published"
_ADAM = "Adam's eps"
_KAGGLE = f"new data, other 80 %, {_ADAM}"
_STAGE_2 = f"{_KAGGLE}, last batch"
_TF1 = "running averages"
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
    _row("R3n", "1-conv, stage 1", 91.23, "new", "cnn1", stage=1, another="protocol",
         differs="20 epochs, batch 512, other split"),
    _row("R3", "1-conv, stage 2", 92.29, "old", "cnn1", stage=2,
         differs=f"{_STAGE_2}, a cell of its notebook ran twice"),
    _row("R3n", "1-conv, stage 2", 91.53, "new", "cnn1", stage=2, differs="likewise", another="protocol"),
    _row("R3", "3-conv, stage 1", 90.79, "old", "cnn3", stage=1, differs=_KAGGLE),
    _row("R3n", "3-conv, stage 1", 90.62, "new", "cnn3", stage=1, differs="likewise, dropout 0.2", another="net"),
    _row("R3", "3-conv, stage 2", 91.17, "old", "cnn3", stage=2, differs=_STAGE_2),
    _row("R3n", "3-conv, stage 2", 90.95, "new", "cnn3", stage=2, differs="likewise", another="net"),
    _row("R3", "4-conv, stage 1", 90.52, "old", "cnn4", stage=1, differs=f"{_KAGGLE}, {_TF1}"),
    _row("R3n", "4-conv, stage 1", 92.67, "new", "cnn4", stage=1, differs="likewise, one pooling", another="net"),
    _row("R3", "4-conv, stage 2", 93.52, "old", "cnn4", stage=2, differs=f"{_STAGE_2}, {_TF1}"),
    _row("R3n", "4-conv, stage 2", 93.54, "new", "cnn4", stage=2, differs="likewise", another="net"),
    _row("R3", "VGG19 features, preprocessing bug", 76.64, "old", "transfer-vgg19-bug", not_run=_VGG19_WEIGHTS),
    _row("R3", "the same bug, EfficientNet-Lite0", 76.64, "old", "transfer-efficientnet_lite0-bug",
         text="76.64 (VGG19)", differs="another backbone; new data", another="net"),
    _row("R3", "EfficientNet-Lite0 features", 76.64, "old", "transfer-efficientnet_lite0",
         text="76.64 (VGG19)", differs="another backbone, no bug; new data", another="net"),
    _row("R4", "A: 128-64", 87.42, "not said", "fc-a", differs=_SPLIT),
    _row("R4", "B: 392-196-98-49", 88.65, "not said", "fc-b", differs=_SPLIT),
    Published("R4", "dense layers only, 2,391,050 parameters", 90.0, math.inf, "> 90 (claimed)", "not said",
              "mlp-best", differs="net and recipe our own"),
    _row("field", "under 100,000 parameters, 98,458", 92.5, "new", "tiny-100k", text="92.5",
         differs="net and recipe our own", another="net"),
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
    records = store.read_all(results_dir)
    marked = leaderboard.implausible(records)
    runs = [run for path, run in records.items() if path not in marked]
    fold_runs = store.read_all(results_dir / "cross_validation").values()
    page = render(runs, fold_runs, controls.read_all(results_dir))
    return {results_dir / "reproduction.md": page} | audit.files(results_dir, records)


def _counts(run: RunRecord) -> bool:
    """Completed, on Fashion-MNIST, and not once more what the same seed gave alone."""
    return run.status == "completed" and not proof.is_unproven(run.data_version) and not run.trained_with


class Measured(NamedTuple):
    """The accuracies that runs gave for what was published, in percent."""

    accuracies: list[float]  # by seed, or by fold
    num_seeds: int  # of each fold
    note: str = ""  # ', bfloat16'

    def cell(self, published: Published) -> str:
        """'90.73 ± 0.62 (3)'."""
        if not self.accuracies:
            return ""
        mean = f"{np.mean(self.accuracies):.2f}"
        if len(self.accuracies) > 1:
            mean += f" ± {np.std(self.accuracies, ddof=0 if published.folds else 1):.2f}"
        folds = f", {self.num_seeds} seeds" if published.folds and self.num_seeds > 1 else ""
        return f"{mean} ({len(self.accuracies)}{folds}){self.note}"


def render(
    runs: Iterable[RunRecord], fold_runs: Iterable[RunRecord], control_runs: Sequence[ControlRecord] = ()
) -> str:
    """The page, from the records of whole runs, of folds and of controls."""
    runs, fold_runs = ([run for run in group if _counts(run)] for group in (runs, fold_runs))
    lines = [
        "# Reproduction of the reference systems",
        "",
        "Generated by `python -m fmbench.reproduction` from the records in `runs/`, `cross_validation/runs/` and",
        "`controls/`.",
        "",
        SYSTEMS,
        "",
        HOW_TO_READ,
        "| system | net | published | its data | ours | ours - published | | control | ours - control | "
        "| our protocol differs in |",
        "|:--|:--|--:|:--|--:|--:|:--|--:|--:|:--|:--|",
    ]
    remarks = []
    for published in PUBLISHED:
        ours = _ours(published, fold_runs if published.folds else runs)
        control = Measured([], 0) if published.another else _of_controls(published, control_runs)
        compared, against = ["", ""], ["", ""]
        shown = ours.cell(published)
        if not ours.accuracies:
            shown = published.not_run or _shortened(published, runs) or "not run here"
        elif published.another:
            compared = ["", f"another {published.another}"]
        else:
            difference, margin, verdict = compare(published, ours.accuracies)
            compared = [_with_margin(difference, margin), verdict]
            if control.accuracies:
                gap, gap_margin, gap_verdict = compare_with_control(
                    ours.accuracies, control.accuracies, are_folds=bool(published.folds)
                )
                against = [_with_margin(gap, gap_margin), gap_verdict]
            if abs(difference) > REMARK_ABOVE and verdict != NOT_APART:
                told = f"{published.net}, {published.text} on {published.data} data: {compared[0]}, {verdict}"
                remarks.append(f"- {told}: {_explanation(control.cell(published), *against)}.")
        name = f"{published.net} (`{published.entry}`)"
        cells = [published.system, name, published.text, published.data, shown, *compared]
        lines.append(f"| {' | '.join([*cells, control.cell(published), *against, published.differs])} |")
    if remarks:
        lines += ["", f"## Differences of more than {REMARK_ABOVE} points", "", *remarks]
    return "\n".join(lines) + "\n"


def _explanation(control: str, gap: str, verdict: str) -> str:
    """What a control tells of a difference from what was published."""
    if verdict in ("equivalent", NOT_APART):
        return f"its own framework gives {control} today, from which ours is {verdict} ({gap})"
    return f"unexplained; its own framework gives {control} today" if control else "unexplained"


def _with_margin(difference: float, margin: float | None) -> str:
    return f"{difference:+.2f}" + ("" if margin is None else f" ± {margin:.2f}")


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


def compare_with_control(
    ours: Sequence[float], control: Sequence[float], *, are_folds: bool
) -> tuple[float, float | None, str]:
    """As `compare`, of ours minus the control's, in percent; 'equivalent' where that is shown, see HOW_TO_READ."""
    if min(len(ours), len(control)) < 2:
        return float(np.mean(ours) - np.mean(control)), None, NOT_TESTED
    test = welch_t_test
    if are_folds:
        test = functools.partial(corrected_resampled_t_test, num_train=len(ours) - 1, num_test=1)
    apart, within = test(control, ours), test(control, ours, level=2 * LEVEL)
    margin = apart.high - apart.mean
    if within.low > -EQUIVALENT and within.high < EQUIVALENT:
        return apart.mean, margin, "equivalent"
    if abs(apart.mean) <= margin:
        return apart.mean, margin, NOT_APART
    return apart.mean, margin, "better" if apart.mean > 0 else "worse"


def _shortened(published: Published, runs: Iterable[RunRecord]) -> str:
    """What the longest run of fewer epochs came to, where the whole one was not run; '' if there is none."""
    shorter = [run for run in runs if run.entry.startswith(f"{published.entry}+num_epochs=")]
    if published.stage or published.folds or not shorter:
        return ""
    longest = max(shorter, key=lambda run: run.num_epochs)
    accuracy = f"{100 * (longest.test_accuracy or 0):.2f} after {longest.num_epochs} epochs"
    return f"not run to its end; {accuracy}{_unless_float32(longest.dtype)}"


def _unless_float32(dtype: str) -> str:
    return "" if dtype == "float32" else f", {dtype}"


def _ours(published: Published, runs: Iterable[RunRecord]) -> Measured:
    """Our accuracies for it; none if there are no runs, or not all of the folds."""
    for dtype in DTYPES:
        of_dtype = [run for run in runs if run.dtype == dtype]
        if published.folds:
            measured = _of_folds(published, ((run, run.val_accuracy) for run in of_dtype))
        else:
            measured = Measured(_by_seed((run, _accuracy(published, run)) for run in of_dtype), 1)
        if measured.accuracies:
            return measured._replace(note=_unless_float32(dtype))
    return Measured([], 0)


def _accuracy(published: Published, run: RunRecord) -> float | None:
    """What a run says of it: the accuracy at the end or after a stage, if it had the whole of that."""
    if not published.stage:
        return run.test_accuracy if run.entry == published.entry else None
    finished = {stage.name: stage for stage in run.stages}.get(f"stage{published.stage}")
    if not finished or run.entry.partition("+num_epochs=")[0] != published.entry:
        return None
    planned = run.config.get("stages", {}).get(finished.name, {}).get("num_epochs")
    return finished.test_accuracy if finished.num_epochs == planned else None


def _of_controls(published: Published, runs: Sequence[ControlRecord]) -> Measured:
    """The controls' accuracies for it, as `_ours`."""
    if published.folds:
        return _of_folds(published, ((run, run.stages[-1].val_accuracy) for run in runs))
    found = []
    for run in runs:
        if not published.stage and run.entry == published.entry:
            found.append((run, run.stages[-1].test_accuracy))
        elif published.stage and run.entry.partition("+num_epochs=")[0] == published.entry:
            planned = run.config.get("stages", {}).get(f"stage{published.stage}", {}).get("num_epochs")
            finished = run.stages[published.stage - 1 : published.stage]
            found += [(run, stage.test_accuracy) for stage in finished if stage.num_epochs == planned]
    return Measured(_by_seed(found), 1)


def _by_seed(found: Iterable[tuple[RunRecord | ControlRecord, float | None]]) -> list[float]:
    """One accuracy a seed, in percent."""
    accuracies = {run.seed: 100 * accuracy for run, accuracy in found if accuracy is not None}
    return [accuracies[seed] for seed in sorted(accuracies)]


def _of_folds(published: Published, found: Iterable[tuple[RunRecord | ControlRecord, float | None]]) -> Measured:
    """Each fold's mean over the seeds that have all of the published folds."""
    by_seed: dict[int, dict[str, float]] = defaultdict(dict)
    for run, accuracy in found:
        entry, _, fold = run.entry.partition("+fold=")
        if fold and entry == published.entry and run.config["data"].get("num_folds") == len(published.folds):
            by_seed[run.seed][fold] = 100 * (accuracy or 0)
    whole = [folds for folds in by_seed.values() if len(folds) == len(published.folds)]
    means = [float(np.mean([folds[fold] for folds in whole])) for fold in sorted(whole[0])] if whole else []
    return Measured(means, len(whole))
