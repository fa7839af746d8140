"""Published numbers beside ours: differences, verdicts, remarks, and what is not there."""

import math
import sys

import numpy as np
import pytest
from fake_records import make_record, make_unfinished, publish

from fmbench import entries
from fmbench import reproduction as command
from fmbench.config import REPOSITORY
from fmbench.pages import leaderboard, reproduction
from fmbench.pages.reproduction import PUBLISHED, Published, compare, compare_with_control
from fmbench.records.controls import ControlEpoch, ControlRecord, ControlStage


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


def fold(number: int, accuracy: float, seed: int = 0):
    data = {"data": {"num_folds": 5, "fold": number}}
    return make_record(f"baseline+fold={number}of5", seed, config=data, val_accuracy=accuracy)


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
    """Keras's Adam is not ours."""
    same = {row.entry for row in PUBLISHED if row.differs == "none but the random numbers"}
    assert same == {"baseline", "baseline-same", "baseline-same64"}
    for entry in same:
        config = entries.load(entry.replace("-", ":"))
        assert (config.optimizer.name, 48_000 % config.batch_size, 60_000 % config.batch_size) == ("sgd", 0, 0)


def test_stages_and_seeds():
    text = reproduction.render([with_stages(0, 0.90, 0.92), with_stages(1, 0.91, 0.92)], [])
    cells = line_of(text, "| R3 |", "stage 1", "`cnn1`")
    assert cells[4:7] == ["90.50 ± 0.71 (2)", "-0.54 ± 5.72", "not told apart"]
    assert line_of(text, "| R3 |", "stage 2", "`cnn1`")[4:7] == ["92.00 ± 0.00 (2)", "-0.29", "not tested"]
    assert line_of(text, "R3n", "stage 2", "`cnn1`")[4:7] == ["92.00 ± 0.00 (2)", "", "another protocol"]
    assert "## Differences" not in text  # luck, or less than half a point


def test_what_may_be_no_luck_is_unexplained():
    runs = [with_stages(seed, accuracy, 0.95) for seed, accuracy in enumerate([0.8990, 0.9000, 0.9010])]
    remarks = reproduction.render(runs, []).partition("## Differences of more than 0.5 points")[2].splitlines()
    assert "- 1-conv, stage 1, 91.04 on old data: -1.04 ± 0.86, worse: unexplained." in remarks
    assert "- 1-conv, stage 2, 92.29 on old data: +2.71, not tested: unexplained." in remarks


def control(entry: str, seed: int, *accuracies: float, val_accuracy: float | None = None, **config):
    """A control with these test accuracies after its stages, of one epoch each."""
    record = make_record(entry)
    config = {"num_epochs": 1, "data": {}} | config
    return ControlRecord(
        created=record.created, framework="keras", system="Keras 3.15.1", versions={}, entry=entry, seed=seed,
        config=config, num_params=1, data_version=record.data_version, data_sha256={}, num_train=1,
        num_validation=1, num_test=1, wall_seconds=1.0, predictions_sha256="", environment=record.environment,
        history=[ControlEpoch(train_loss=1.0, train_accuracy=0.5, val_accuracy=None)] * len(accuracies),
        stages=[ControlStage(num_epochs=1, test_accuracy=a, val_accuracy=val_accuracy) for a in accuracies],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "difference", "margin", "verdict"),
    [
        # Both s = 0.1, n = 3: standard error 0.081650, t(4) = 2.77645 and, for 90 %, 2.13185.
        ([90.1, 90.2, 90.3], [90.0, 90.1, 90.2], 0.1, 0.22670, "equivalent"),
        ([90.23, 90.33, 90.43], [90.0, 90.1, 90.2], 0.23, 0.22670, "better"),
        ([89.77, 89.87, 89.97], [90.0, 90.1, 90.2], -0.23, 0.22670, "worse"),
        ([90.2, 90.3, 90.4], [90.0, 90.1, 90.2], 0.2, 0.22670, "not told apart"),
        # Unequal spreads: t(2) = 4.30265 with 0.057735 alone.
        ([90.0, 90.1, 90.2], [90.1, 90.1, 90.1], 0.0, 0.24841, "equivalent"),
        ([90.0], [90.0, 90.1], -0.05, None, "not tested"),
    ],
)
def test_ours_and_a_control(ours, theirs, difference, margin, verdict):
    got, half, said = compare_with_control(ours, theirs, are_folds=False)
    assert got == pytest.approx(difference)
    assert half == (margin and pytest.approx(margin, abs=1e-4))
    assert said == verdict


def test_folds_and_a_control_are_compared_fold_by_fold():
    theirs = [90.0, 91.0, 92.0, 90.0, 91.0]
    ours = [90.1, 91.2, 92.1, 90.2, 91.1]  # 0.14 ± 0.0548, times sqrt(1/5 + 1/4), t(4) = 2.7764
    got, half, said = compare_with_control(ours, theirs, are_folds=True)
    assert (got, half, said) == (pytest.approx(0.14), pytest.approx(0.10202, abs=1e-4), "equivalent")


def test_a_control_stands_beside_ours_and_may_explain():
    stages = {"stage1": {"num_epochs": 1}, "stage2": {"num_epochs": 1}}
    runs = [with_stages(seed, accuracy, 0.95) for seed, accuracy in enumerate([0.8990, 0.9000, 0.9010])]
    controls = [
        control("cnn1", seed, accuracy, 0.9, stages=stages) for seed, accuracy in enumerate([0.899, 0.901])
    ]
    controls.append(control("cnn1+num_epochs=1", 2, 0.9, stages=stages))
    text = reproduction.render(runs, [], controls)
    assert line_of(text, "| R3 |", "stage 1", "`cnn1`")[7:10] == ["90.00 ± 0.10 (3)", "+0.00 ± 0.23", "equivalent"]
    assert line_of(text, "| R3 |", "stage 2", "`cnn1`")[7] == "90.00 ± 0.00 (2)"
    assert line_of(text, "R3n", "stage 1", "`cnn1`")[7] == ""
    said = "its own framework gives 90.00 ± 0.10 (3) today, from which ours is equivalent (+0.00 ± 0.23)."
    assert f"- 1-conv, stage 1, 91.04 on old data: -1.04 ± 0.86, worse: {said}" in text
    assert "+2.71, not tested: unexplained; its own framework gives 90.00 ± 0.00 (2) today." in text


def test_a_control_without_ours_is_shown_alone():
    cells = line_of(reproduction.render([], [], [control("fc-a", 0, 0.87)]), "`fc-a`")
    assert cells[4:10] == ["not run here", "", "", "87.00 (1)", "", ""]


def test_several_seeds_of_a_fold_are_their_mean():
    folds = [
        fold(number, accuracy + shift, seed)
        for seed, shift in ((0, -0.01), (3, 0.01))
        for number, accuracy in enumerate([0.91, 0.92, 0.91, 0.92, 0.91])
    ]
    assert line_of(reproduction.render([], folds), "91.187")[4] == "91.40 ± 0.49 (5, 2 seeds)"
    assert line_of(reproduction.render([], folds[:-1]), "91.187")[4] == "90.40 ± 0.49 (5)"
    data = {"data": {"num_folds": 5}}
    theirs = [
        control(f"baseline+fold={n}of5", seed, 0.9, val_accuracy=0.914, **data)
        for n in range(5)
        for seed in (0, 1)
    ]
    theirs.append(control("baseline", 0, 0.9, data={"num_folds": 5}))  # of all images
    assert line_of(reproduction.render([], folds, theirs), "91.187")[7] == "91.40 ± 0.00 (5, 2 seeds)"


def test_a_run_of_the_first_stage_alone_says_nothing_of_the_second():
    text = reproduction.render([with_stages(0, 0.90)], [])
    assert line_of(text, "| R3 |", "stage 1", "`cnn1`")[4] == "90.00 (1)"
    assert line_of(text, "| R3 |", "stage 2", "`cnn1`")[4] == "not run here"


def test_a_stage_cut_short_does_not_count():
    text = reproduction.render([with_stages(0, 0.90, 0.91, planned=(1, 2))], [])
    assert line_of(text, "| R3 |", "stage 1", "`cnn1`")[4] == "90.00 (1)"
    assert line_of(text, "| R3 |", "stage 2", "`cnn1`")[4] == "not run here"


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


def test_check_finds_a_stale_page(tmp_path, monkeypatch, capsys):
    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["reproduction", f"--results_dir={tmp_path}", *arguments])
        try:
            command.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    publish(make_record("fc-a"), tmp_path)
    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    publish(make_record("fc-a", seed=1), tmp_path)
    assert run("--check") == 1
    assert "run python -m fmbench.reproduction" in capsys.readouterr().err


def test_implausible_runs_do_not_count(tmp_path, monkeypatch):
    for seed in (0, 1):
        path = publish(make_record("fc-a", seed), tmp_path)
    monkeypatch.setattr(leaderboard, "implausible", lambda records: {path: "too good"})
    (text,) = reproduction.files(tmp_path).values()
    assert line_of(text, "`fc-a`")[4] == "90.00 (1)"
