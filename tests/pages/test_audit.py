"""What is said of public claims and of doubtful labels, from runs whose predictions are known."""

import numpy as np
import pytest
from fake_records import make_record

from fmbench.data import fashion_mnist
from fmbench.pages import audit
from fmbench.pages.audit import Entry


def entry(name: str, *predictions: list[int], labels: list[int]) -> Entry:
    classes = np.array(predictions, np.uint8)
    accuracies = (classes == labels).mean(axis=1)
    runs = [
        make_record(name, seed).model_copy(update={"test_accuracy": accuracy})
        for seed, accuracy in enumerate(accuracies)
    ]
    return Entry(runs, classes)


def test_labels_are_doubted_by_all_runs_of_other_entries(monkeypatch):
    monkeypatch.setattr(audit, "JUDGES_ABOVE", 0.3)
    monkeypatch.setattr(audit, "NEAR_DUPLICATES", (4,))
    labels = [0, 1, 2, 3, 4]
    entries = [
        entry("a", [9, 8, 2, 3, 4], [9, 7, 2, 3, 5], labels=labels),  # of the second image two other classes
        entry("b", [9, 8, 2, 6, 4], labels=labels),
        entry("c", [9, 8, 2, 3, 4], labels=labels),
        entry("worse", [0, 9, 9, 9, 9], labels=labels),  # which is not asked
    ]
    first, _, *table = audit.doubtful(entries, np.array(labels, np.uint8)).splitlines()
    assert "5 test images, 2 are wrong in each of the 4 runs above 30 %, and 1 of them are" in first
    assert table[2:] == [
        "| c | 60.00 (1) | 75.00 (1 images fewer) | 50.00 (1 fewer) |",
        "| a | 50.00 (2) | 83.33 (2 images fewer) | 50.00 (1 fewer) |",
        "| b | 40.00 (1) | 50.00 (1 images fewer) | 25.00 (1 fewer) |",
    ]


def test_a_claim_stands_beside_the_best_row_of_its_entry():
    labels = [0, 1, 2, 3]
    rows = [
        entry("mlp", [0, 1, 9, 9], labels=labels),
        entry("mlp+num_epochs=2", [0, 1, 2, 9], [0, 1, 2, 3], labels=labels),
        entry("mlp-best", [0, 1, 2, 3], labels=labels),
    ]
    (line,) = [line for line in audit.claims(rows).splitlines() if "MLP 256-128-64" in line]
    assert "| mlp+num_epochs=2: 87.50 ± 17.68 (2) |" in line
    (line,) = [line for line in audit.claims(rows).splitlines() if "WRN-40-4" in line]
    assert "| not run here |" in line


@pytest.mark.slow
def test_the_near_duplicates_are_those():
    data = fashion_mnist.load()
    train, test = (images.reshape(-1, 784).astype(np.float32) for images in (data.train_images, data.test_images))
    found = []
    for start in range(0, len(test), 1000):
        part = test[start : start + 1000]
        squares = np.square(train).sum(axis=1) + np.square(part).sum(axis=1)[:, None] - 2 * part @ train.T
        found += (start + np.flatnonzero(squares.min(axis=1) <= 784 * 10**2)).tolist()
    assert tuple(found) == audit.NEAR_DUPLICATES
