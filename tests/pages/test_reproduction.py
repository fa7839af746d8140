"""Published numbers beside ours: differences, verdicts, remarks, and what is not there."""

import math
import subprocess
import sys

import numpy as np
import pytest
from fake_records import make_record, make_unfinished, publish

from fmbench import entries
from fmbench.config import REPOSITORY
from fmbench.pages import reproduction
from fmbench.pages.reproduction import PUBLISHED, Published, compare


def published(low: float, high: float | None = None, **fields) -> Published:
    return Published("R9", "net", low, high or low, str(low), fields.pop("data", "new"), "mlp", **fields)


def line_of(text: str, *parts: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith("|") and all(part in line for part in parts))
    return [cell.strip() for cell in line.strip("|").split("|")]


def with_stages(seed: int, *accuracies: float, planned=(1, 1)):
    """A run of cnn1 with these test accuracies after the stages it had, of one epoch each."""
    common = {"num_epochs": 1, "learning_rate": 1e-3, "augment": {}, "val_accuracy": None}
    common |= {"train_seconds": 1.0, "train_core_seconds": 2.0}
    stages = [
        common | {"name": f"stage{number}", "test_accuracy": accuracy}
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    config = {f"stage{number}": {"num_epochs": epochs} for number, epochs in enumerate(planned, start=1)}
    entry = "cnn1" if len(accuracies) == 2 else "cnn1+num_epochs=1"
    return make_record(entry, seed, config={"stages": config}, stages=stages)


def fold(number: int, accuracy: float):
    data = {"data": {"num_folds": 5, "fold": number}}
    return make_record(f"baseline+fold={number}of5", config=data, val_accuracy=accuracy)


@pytest.mark.parametrize(
    ("reference", "accuracies", "difference", "margin", "verdict"),
    [
        # s = 0.1, t(2) = 4.3027, times sqrt(1 + 1/3).
        (published(90.0), [90.39, 90.49, 90.59], 0.49, 0.49683, "not told apart"),
        (published(90.0), [90.40, 90.50, 90.60], 0.50, 0.49683, "better"),
        (published(90.0), [89.40, 89.50, 89.60], -0.50, 0.49683, "worse"),
        # s = sqrt(1/2), t(1) = 12.706, times sqrt(3/2): two runs tell little.
        (published(80.0), [90.0, 91.0], 10.5, 11.00390, "not told apart"),
        (published(79.0), [90.0, 91.0], 11.5, 11.00390, "better"),
        # To the first, two times 90 * 10 / 10,000 are added: sqrt(0.19333), t(420.5) = 1.9656.
        (published(90.0, data="old"), [89.90, 90.00, 90.10], 0.0, 0.86428, "not told apart"),
        (published(90.0, data="not said"), [89.90, 90.00, 90.10], 0.0, 0.86428, "not told apart"),
        # Ranges: to the nearer end.
        (published(89.0, 90.0), [89.40, 89.50, 89.60], 0.0, 0.49683, "not told apart"),
        (published(89.0, 90.0), [88.40, 88.50, 88.60], -0.5, 0.49683, "worse"),
        (published(94.0, math.inf), [94.90, 95.00, 95.10], 0.0, 0.49683, "not told apart"),
        # Fold by fold 1, 0, 1, 0, 1: s² = 0.3, times 1/5 + 1/4, t(4) = 2.7764.
        (published(90.0, folds=(90.0,) * 5), [91.0, 90.0, 91.0, 90.0, 91.0], 0.6, 1.02014, "not told apart"),
        (published(89.5, folds=(89.5,) * 5), [91.0, 90.0, 91.0, 90.0, 91.0], 1.1, 1.02014, "better"),
        # That a fold is hard for both is no difference: 0.9, 1.0, 1.1, 1.0, 1.0.
        (
            published(90.0, folds=(86.0, 91.0, 92.0, 90.0, 91.0)),
            [86.9, 92.0, 93.1, 91.0, 92.0],
            1.0,
            0.13170,
            "better",
        ),
        # No spread, no test.
        (published(90.0), [99.0], 9.0, None, "not tested"),
        (published(90.0, data="old"), [99.0, 99.0], 9.0, None, "not tested"),
    ],
)
def test_a_difference_counts_beyond_its_interval(reference, accuracies, difference, margin, verdict):
    got, half, said = compare(reference, accuracies)
    assert got == pytest.approx(difference)
    assert half == (margin and pytest.approx(margin, abs=1e-5))
    assert said == verdict


def test_published_folds_have_the_published_mean_and_spread():
    rows = [row for row in PUBLISHED if row.folds]
    assert len(rows) == 3
    for row in rows:
        assert row.text == f"{np.mean(row.folds):.3f} ± {np.std(row.folds):.3f}"
        assert row.low == round(float(np.mean(row.folds)), 3)


def test_none_but_the_random_numbers_where_it_is_true():
    """Keras's Adam is not ours, and 256 and 512 do not divide its 48,000 train images."""
    same = {row.entry for row in PUBLISHED if row.differs == "none but the random numbers"}
    assert same == {"baseline", "baseline-same", "baseline-same64"}
    for entry in same:
        config = entries.load(entry.replace("-", ":"))
        assert (config.optimizer.name, 48_000 % config.batch_size, 60_000 % config.batch_size) == ("sgd", 0, 0)


def test_stages_and_seeds():
    text = reproduction.render([with_stages(0, 0.90, 0.92), with_stages(1, 0.91, 0.92)], [])
    first, second = "91.2 (reported)", "91.5 (reported)"
    cells = line_of(text, "stage 1", "`cnn1`", first)
    assert cells[4:7] == ["90.50 ± 0.71 (2)", "-0.70 ± 11.00", "not told apart"]
    assert line_of(text, "stage 2", "`cnn1`", second)[4:7] == ["92.00 ± 0.00 (2)", "+0.50", "not tested"]
    assert "## Differences" not in text  # luck, or half a point, which is not more than that


def test_what_may_be_no_luck_is_unexplained():
    runs = [with_stages(seed, accuracy, 0.95) for seed, accuracy in enumerate([0.8990, 0.9000, 0.9010])]
    remarks = reproduction.render(runs, []).partition("## Differences of more than 0.5 points")[2].splitlines()
    assert "- 1-conv, stage 1, 91.2 (reported) on new data: -1.20 ± 0.50, worse: unexplained." in remarks
    assert "- 1-conv, stage 2, 92.29 on old data: +2.71, not tested: unexplained." in remarks


def test_a_run_of_the_first_stage_alone_says_nothing_of_the_second():
    text = reproduction.render([with_stages(0, 0.90)], [])
    assert line_of(text, "stage 1", "`cnn1`", "reported")[4] == "90.00 (1)"
    assert line_of(text, "stage 2", "`cnn1`", "reported")[4] == "not run here"


def test_a_stage_cut_short_does_not_count():
    text = reproduction.render([with_stages(0, 0.90, 0.91, planned=(1, 2))], [])
    assert line_of(text, "stage 1", "`cnn1`", "reported")[4] == "90.00 (1)"
    assert line_of(text, "stage 2", "`cnn1`", "reported")[4] == "not run here"


def test_a_shortened_run_is_called_that():
    runs = [make_record("vgg_like+num_epochs=1"), make_record("vgg_like+batch_size=9")]
    cells = line_of(reproduction.render(runs, []), "`vgg_like`")
    assert cells[4:6] == ["not run to its end; 90.00 after 1 epochs", ""]


def test_folds_count_when_all_are_there():
    folds = [fold(number, accuracy) for number, accuracy in enumerate([0.91, 0.92, 0.91, 0.92, 0.91])]
    assert line_of(reproduction.render([], folds), "91.187")[4] == "91.40 ± 0.49 (5)"
    assert line_of(reproduction.render([], folds[1:]), "91.187")[4] == "not run here"
    assert line_of(reproduction.render([], folds), "90.99")[4] == "not run here"


def test_folds_are_compared_each_with_its_own():
    """The published ones and half a point: nothing is left to the interval but rounding."""
    theirs = next(row.folds for row in PUBLISHED if row.entry == "baseline")
    folds = [fold(number, (accuracy + 0.5) / 100) for number, accuracy in enumerate(theirs)]
    for order in (folds, folds[::-1]):
        cells = line_of(reproduction.render([], order), "91.187")
        assert cells[4:7] == ["91.69 ± 0.12 (5)", "+0.50 ± 0.00", "better"]


def test_bfloat16_counts_where_there_is_no_float32_and_says_so():
    bfloat16 = make_record("fc-a", wrong=30, dtype="bfloat16")
    assert line_of(reproduction.render([bfloat16], []), "`fc-a`")[4] == "85.00 (1), bfloat16"
    assert line_of(reproduction.render([bfloat16, make_record("fc-a")], []), "`fc-a`")[4] == "90.00 (1)"
    shorter = make_record("resnet-20+num_epochs=1", dtype="bfloat16")
    cells = line_of(reproduction.render([shorter], []), "`resnet-20`")
    assert cells[4] == "not run to its end; 90.00 after 1 epochs, bfloat16"


def test_unfinished_runs_do_not_count():
    runs = [make_unfinished("interrupted", "fc-a")]
    assert line_of(reproduction.render(runs, []), "`fc-a`")[4] == "not run here"


def test_runs_and_folds_on_other_data_do_not_count():
    version = "unproven-00000000"
    whole = make_record("baseline", data_version=version)
    assert line_of(reproduction.render([whole], []), "90.99")[4] == "not run here"
    folds = [fold(number, 0.91).model_copy(update={"data_version": version}) for number in range(5)]
    assert line_of(reproduction.render([], folds), "91.187")[4] == "not run here"


def test_what_cannot_be_run_says_why():
    assert line_of(reproduction.render([], []), "`transfer-vgg19-bug`")[4].startswith("not run: weights")


def test_another_net_is_shown_but_not_compared():
    text = reproduction.render([make_record("transfer-efficientnet_lite0")], [])
    cells = line_of(text, "`transfer-efficientnet_lite0`")
    assert cells[4:7] == ["90.00 (1)", "", "another net"]
    assert "## Differences" not in text


def test_every_entry_has_a_config():
    for row in PUBLISHED:
        assert (REPOSITORY / "configs" / f"{row.entry.partition('-')[0]}.py").is_file(), row.entry


def test_check_finds_a_stale_page(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "fmbench.reproduction", f"--results_dir={tmp_path}", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    publish(make_record("fc-a"), tmp_path)
    assert run("--check").returncode == 1
    assert run().returncode == 0
    assert run("--check").returncode == 0
    publish(make_record("fc-a", seed=1), tmp_path)
    stale = run("--check")
    assert stale.returncode == 1
    assert "run python -m fmbench.reproduction" in stale.stderr
