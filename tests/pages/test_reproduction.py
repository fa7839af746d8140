"""Published numbers beside ours: differences, verdicts, remarks, and what is not there."""

import math
import subprocess
import sys

import pytest
from fake_records import make_record, make_unfinished, publish

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
    ("reference", "accuracies", "difference", "verdict"),
    [
        (published(90.0), [90.5], 0.5, "same"),  # binomial standard error 0.29
        (published(90.0), [90.7], 0.7, "better"),
        (published(90.0), [89.3], -0.7, "worse"),
        (published(90.0, data="old"), [90.7], 0.7, "same"),  # standard error 0.51
        (published(89.0, 90.0), [89.4], 0.0, "same"),
        (published(89.0, 90.0), [88.0], -1.0, "worse"),
        (published(94.0, math.inf), [95.0], 0.0, "same"),
        # s = 0.1, times sqrt(1 + 1/3), twice: 0.231
        (published(90.0), [90.13, 90.23, 90.33], 0.23, "same"),
        (published(90.0), [90.14, 90.24, 90.34], 0.24, "better"),
    ],
)
def test_a_difference_counts_above_two_standard_errors(reference, accuracies, difference, verdict):
    got, said = compare(reference, accuracies)
    assert got == pytest.approx(difference)
    assert said == verdict


def test_stages_and_seeds():
    text = reproduction.render([with_stages(0, 0.90, 0.92), with_stages(1, 0.91, 0.92)], [])
    assert line_of(text, "stage 1", "`cnn1`", "91.2 (reported)")[4:7] == ["90.50 ± 0.71 (2)", "-0.70", "same"]
    assert line_of(text, "stage 2", "`cnn1`", "91.5 (reported)")[4:7] == ["92.00 ± 0.00 (2)", "+0.50", "better"]
    assert "- 1-conv, stage 1, 91.2 (reported) on new data: -0.70, unexplained." in text
    assert "1-conv, stage 2" not in text.partition("## Differences")[2]  # half a point is not more than that


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
