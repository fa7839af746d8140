"""Public claims beside what the same kind of net gave here, and what accuracies are without doubtful test images.

Both tables stand between marks in docs/audit.md; `python -m fmbench.reproduction` writes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbench.data import fashion_mnist, proof
from fmbench.pages import generated, leaderboard
from fmbench.records import store
from fmbench.records.schema import RunRecord
from fmbench.records.statistics import mean_and_std

CLAIMS_MARKS = ("<!-- claims: begin -->", "<!-- claims: end -->")
DOUBTFUL_MARKS = ("<!-- doubtful: begin -->", "<!-- doubtful: end -->")
JUDGES_ABOVE = 0.93  # test accuracy of the runs that are asked which labels are doubtful
MOST_ROWS = 8

# Test images with a train image at a distance of at most 10 grey levels (root mean square over the pixels).
NEAR_DUPLICATES = (
    436, 2115, 2230, 2436, 2605, 2770, 4222, 4926, 4998, 5181, 6210, 6650, 7357, 7391, 7465, 7799, 8869, 9867
)  # fmt: skip


class Claim(NamedTuple):
    """A row of a public table, or of a paper."""

    net: str
    accuracy: str  # percent, as it was claimed
    by: str
    data: str  # version, if known
    entry: str  # of the same kind here; '' if there is none
    verdict: str


_TABLE = "the data's own table"
CLAIMS = (
    Claim("WRN-40-4, crops and flips", "96.7", _TABLE, "old", "wide_resnet-40-4",
          "no: its submitter's own log has 96.07"),
    Claim("WRN-28-10, random erasing", "96.3", _TABLE, "old", "wide_resnet-28-10",
          "of the old data; on today's 95.7 is published, after the last epoch"),
    Claim("2 convolutions, 2 dense layers", "93.9", _TABLE, "not known", "", "no: its own notebook has 93.29"),
    Claim("ResNet-18, normalised, flips, shifts, rotations", "94.9", _TABLE, "old", "resnet-18",
          "of the old data"),
    Claim("VGG16, 26 million parameters", "93.5", _TABLE, "not known", "vgg_like",
          "believable: a net of 1.5 million comes as far"),
    Claim("2 convolutions, under 100,000 parameters", "92.5", _TABLE, "new", "tiny-100k",
          "believable: that size carries more"),
    Claim("MLP 256-128-64", "90.0", _TABLE, "not known", "mlp",
          "believable: 256-512-100 is a point below, a net of 2.4 million above"),
    Claim("dense layers only", "> 90", "R4", "not said", "mlp-best", "yes, with more parameters and epochs"),
    Claim("3 convolutions, 2 dense layers, dropout", "92.6", _TABLE, "not known", "cnn3",
          "not shown: with 10 epochs and without augmentation far from it"),
    Claim("VGG-like net, 50 epochs", "> 94", "R2", "new", "vgg_like",
          "seen on the test set at some epoch; after the last one not shown"),
    Claim("ResNet-20, random erasing", "95.55 ± 0.04", "published", "new", "resnet-20",
          "believable: a third of its epochs comes near"),
    Claim("shake-shake-26 2x96d, Cutout, 400 epochs", "96.15", "hysts", "new", "shake_shake-26-2x96d",
          "one run, after the last epoch, with its log; not run here"),
    Claim("a net of a paper", "99.65", "a paper", "not known", "",
          "contradicts the labels: 35 errors are fewer than the doubtful images below"),
)  # fmt: skip


class Entry(NamedTuple):
    """The completed runs of an entry under one condition, on the standard data."""

    runs: list[RunRecord]
    predictions: np.ndarray  # classes, uint8 (runs, num_test)

    @property
    def name(self) -> str:
        return self.runs[0].entry

    @property
    def accuracy(self) -> float:
        return float(np.mean([run.test_accuracy or 0 for run in self.runs]))


def files(results_dir: Path, records: dict[Path, RunRecord]) -> dict[Path, str]:
    """docs/audit.md beside the results directory; nothing, if there is none, or it has no marks."""
    page = results_dir.parent / "docs" / "audit.md"
    by_condition = leaderboard.entries_by_condition(records)
    entries = [
        Entry(
            list(runs.values()),
            np.stack([store.read_predictions(run, path.with_suffix(".npy")) for path, run in runs.items()]),
        )
        for condition, of_condition in by_condition.items()
        if condition.data_version == proof.STANDARD
        for runs in of_condition
    ]
    written = generated.between_marks(page, CLAIMS_MARKS, [claims(entries)])
    if not written or not entries:
        return written
    table = doubtful(entries, fashion_mnist.load_once("tfds").test_labels)
    return generated.between_marks(page, DOUBTFUL_MARKS, [table], written[page])


def claims(entries: Sequence[Entry]) -> str:
    """The table of claims, each with the most accurate of its entry's rows."""
    lines = ["| net | claimed, % | by | data | here, % | verdict |", "|:--|--:|:--|:--|:--|:--|"]
    for claim in CLAIMS:
        rows = [entry for entry in entries if claim.entry and entry.name.partition("+")[0] == claim.entry]
        here = "not run here" if claim.entry else "-"
        if rows:
            best = max(rows, key=lambda entry: entry.accuracy)
            mean, std = mean_and_std([100 * (run.test_accuracy or 0) for run in best.runs])
            spread = "" if std is None else f" ± {std:.2f}"
            here = f"{generated.text(best.name)}: {mean:.2f}{spread} ({len(best.runs)})"
        lines.append(f"| {claim.net} | {claim.accuracy} | {claim.by} | {claim.data} | {here} | {claim.verdict} |")
    return "\n".join(lines)


def doubtful(entries: Sequence[Entry], labels: np.ndarray) -> str:
    """How many labels all good runs contradict, and what the best entries have without those images.

    Args:
        entries: One at least.
        labels: The true classes, uint8 (num_test,).
    """
    judges = [entry for entry in entries if entry.accuracy > JUDGES_ABOVE]
    wrong, doubted = _doubted(judges, labels)
    runs = sum(len(entry.runs) for entry in judges)
    lines = [
        f"Of the {len(labels):,} test images, {wrong.sum()} are wrong in each of the {runs} runs above "
        f"{100 * JUDGES_ABOVE:.0f} %, and {doubted.sum()} of them are the same other class in each.",
        "",
        "| entry | test accuracy, % (runs) | without images doubted by all runs of other entries | without near-"
        "duplicates of train images |",
        "|:--|--:|--:|--:|",
    ]
    near = np.isin(np.arange(len(labels)), NEAR_DUPLICATES)
    best: dict[str, Entry] = {}
    for entry in sorted(judges, key=lambda entry: -entry.accuracy):
        best.setdefault(entry.name, entry)
    for entry in list(best.values())[:MOST_ROWS]:
        others = [judge for judge in judges if judge.name != entry.name]
        if others:
            _, doubted = _doubted(others, labels)
            correct = entry.predictions == labels
            cells = [
                generated.text(entry.name),
                f"{100 * correct.mean():.2f} ({len(entry.runs)})",
                f"{100 * correct[:, ~doubted].mean():.2f} ({doubted.sum()} images fewer)",
                f"{100 * correct[:, ~near].mean():.2f} ({near.sum()} fewer)",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _doubted(judges: Sequence[Entry], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images that every run gets wrong, and those that all take for the same class; bool (num_test,) each."""
    if not judges:
        return np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    predictions = np.concatenate([judge.predictions for judge in judges])
    wrong = (predictions != labels).all(axis=0)
    return wrong, wrong & (predictions == predictions[0]).all(axis=0)
