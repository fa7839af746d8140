"""Two entries held against each other: which records are taken, what is said in which format, what is refused."""

import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_records import EPOCH, VERSION, fake_dataset, make_record, make_unfinished, predictions_with, publish

from fmbench import compare as command
from fmbench.data import fashion_mnist
from fmbench.pages import drawing
from fmbench.records.schema import Epoch
from fmbench.records.statistics import recipe_difference

WRONG = {"good": (2, 4, 6), "bad_one": (40, 60)}  # of 200: 98 and 75 % on average


@pytest.fixture(autouse=True)
def fake_data(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", lambda source: fake_dataset())


@pytest.fixture
def results_dir(tmp_path) -> Path:
    """Records of two entries under one condition."""
    publish_all(tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def run(results_dir, monkeypatch, capsys):
    """Runs `fmbench.compare`: exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare", f"--results_dir={results_dir}", *arguments])
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def publish_all(results_dir: Path, **changes) -> None:
    for entry, wrongs in WRONG.items():
        for seed, wrong in enumerate(wrongs):
            publish(make_record(entry, seed, wrong=wrong, **changes), results_dir, wrong=wrong)


def refused(answer: tuple[int, str, str]) -> str:
    """The only line of a refusal, without the command's name."""
    code, out, err = answer
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err.removeprefix("fmbench.compare: ").strip()


def expected() -> tuple[str, str, str]:
    """Low and high end of the interval, and p."""
    right = {
        entry: [predictions_with(wrong) == fake_dataset().test_labels for wrong in WRONG[entry]] for entry in WRONG
    }
    _, low, high, p = recipe_difference(*(np.stack(right[entry]) for entry in ("good", "bad_one")))
    return f"{100 * low:+.2f}", f"{100 * high:+.2f}", f"{p:.2g}"


def test_text(run):
    low, high, p = expected()
    code, out, err = run("good", "bad_one")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"bad_one minus good: -23.00 points, 95 % interval {low} to {high}, p = {p}",
        "good: mean 98.00 %, std 1.00, n = 3 (seeds 0, 1, 2)",
        "bad_one: mean 75.00 %, std 7.07, n = 2 (seeds 0, 1)",
        f"on 1 x Abacus 9 (2 cores), float32, data of {VERSION}; the same 200 test images",
    ]
    assert out.isascii()


def test_b_is_held_against_a(run):
    low, high, _ = expected()
    _, out, _ = run("bad_one", "good")
    turned = f"{high} to {low}".translate(str.maketrans("+-", "-+"))
    assert out.startswith(f"good minus bad_one: +23.00 points, 95 % interval {turned}, ")


def test_markdown(run):
    low, high, p = expected()
    _, out, _ = run("good", "bad_one", "--format=markdown")
    head, line, row, _, note = out.splitlines()
    assert head == "| A | accuracy of A (n) | B | accuracy of B (n) | difference | 95 % interval | p |"
    assert len(line.split("|")) == len(head.split("|"))
    assert row == f"| good | 98.00 ± 1.00 (3) | bad_one | 75.00 ± 7.07 (2) | -23.00 | {low} to {high} | {p} |"
    assert f"float32, data of {VERSION}; " in note


def test_latex(run):
    low, high, p = expected()
    _, out, _ = run("good", "bad_one", "--format=latex")
    assert out.startswith("% 1 x Abacus 9")
    assert out.isascii()
    assert r"difference & 95 \% interval & p \\" in out
    row = rf"good & 98.00 $\pm$ 1.00 (3) & bad\_one & 75.00 $\pm$ 7.07 (2) & -23.00 & {low} to {high} & {p} \\"
    assert row in out.splitlines()
    columns = re.search(r"begin\{tabular\}\{(\w+)\}", out)
    assert columns and len(columns[1]) == row.count("&") + 1


def with_a_third(results_dir: Path) -> tuple[float, float]:
    """Publishes a third entry. Returns p of bad_one and of third, each held against good alone."""
    for seed, wrong in enumerate((5, 7)):
        publish(make_record("third", seed, wrong=wrong), results_dir, wrong=wrong)
    correct = {
        entry: np.stack([predictions_with(wrong) == fake_dataset().test_labels for wrong in wrongs])
        for entry, wrongs in (WRONG | {"third": (5, 7)}).items()
    }
    first, second = (recipe_difference(correct["good"], correct[other]).p_value for other in ("bad_one", "third"))
    return first, second


def test_several_are_held_against_the_first_and_p_is_holms(results_dir, run):
    bad, third = with_a_third(results_dir)
    assert 2 * bad < third < 0.5  # hence Holm doubles the one, and leaves the other as it is
    out = run("good", "third", "bad_one")[1].splitlines()
    assert out[0].startswith("third minus good: -1.00 points") and out[0].endswith(f"p = {third:.2g}")
    assert out[1].startswith("bad_one minus good: -23.00 points") and out[1].endswith(f"p = {2 * bad:.2g}")
    assert [line.partition(":")[0] for line in out[2:5]] == ["good", "third", "bad_one"]
    assert out[5] == "p-values by Holm over the 2 pairs; each interval is for its pair alone"
    markdown = run("good", "third", "bad_one", "--format=markdown")[1].splitlines()
    assert [line.split(" | ")[2] for line in markdown[2:4]] == ["third", "bad_one"]
    assert markdown[-1].endswith("p-values by Holm over the 2 pairs; each interval is for its pair alone.")


def test_csv_has_all_digits_and_no_formulas(results_dir, run):
    bad, third = with_a_third(results_dir)
    rows = list(csv.DictReader(io.StringIO(run("good", "third", "bad_one", "--format=csv")[1])))
    assert [(row["a"], row["b"], row["n_a"], row["n_b"]) for row in rows] == [
        ("good", "third", "3", "2"),
        ("good", "bad_one", "3", "2"),
    ]
    assert [float(row["p_value"]) for row in rows] == [third, 2 * bad]
    assert float(rows[1]["difference"]) == pytest.approx(-0.23, abs=1e-12)
    assert [row["holm_over"] for row in rows] == ["2", "2"]


def test_the_figure_has_a_mean_and_a_band_for_each_entry(results_dir, run, tmp_path):
    for number, suffix in enumerate(("svg", "png", "pdf")):
        path = tmp_path / f"curves.{suffix}"
        assert run("good", "bad_one", f"--figure={path}")[0] == 0
        assert path.read_bytes().startswith((b"<?xml", b"\x89PNG", b"%PDF")[number])
    assert "expected a file that ends in .svg" in refused(run("good", "bad_one", "--figure=curves.jpg"))


def test_curves_are_means_over_the_seeds_that_have_the_epoch():
    def history(*losses: float) -> list[Epoch]:
        return [Epoch(**(EPOCH | {"epoch": number, "train_loss": x})) for number, x in enumerate(losses, 1)]

    figure = drawing.overlaid_curves({"a": [history(3.0, 2.0), history(1.0)], "b": [history(0.5)]})
    upper, lower = figure.axes
    assert [line.get_xydata().tolist() for line in upper.lines] == [[[1, 2], [2, 2]], [[1, 0.5]]]  # type: ignore[union-attr]
    band = np.asarray(upper.collections[0].get_paths()[0].vertices).tolist()
    assert {round(y, 6) for x, y in band if x == 1} == {round(2 - 2**0.5, 6), round(2 + 2**0.5, 6)}
    assert (
        len({line.get_linestyle() for line in upper.lines})
        == len({line.get_marker() for line in upper.lines})
        == 2
    )
    assert [axes.get_title() for axes in figure.axes] == ["Training loss", "Accuracy on the validation set"]
    assert lower.lines[0].get_ydata().tolist() == [85.0, 85.0]  # type: ignore[union-attr]
    assert figure.get_size_inches()[0] < 3.5


def test_a_tiny_p_is_below_a_bound(results_dir, run):
    for seed in range(4):
        publish(make_record("worse", seed, wrong=100 + seed), results_dir, wrong=100 + seed)
    assert ", p < 0.0001\n" in run("good", "worse")[1]
    assert run("good", "worse", "--format=markdown")[1].splitlines()[2].endswith("| < 0.0001 |")
    assert "& $<$ 0.0001" in run("good", "worse", "--format=latex")[1]


def test_a_single_seed_is_no_recipe(results_dir, run):
    publish(make_record("alone", wrong=0), results_dir, wrong=0)
    said = refused(run("good", "alone"))
    assert said.startswith(
        "no test is possible: alone has a single seed (n = 1) on 1 x Abacus 9 (2 cores), float32"
    )
    publish(make_record("alike", wrong=0), results_dir, wrong=0)
    assert "alike and alone have a single seed (n = 1)" in refused(run("alike", "alone"))


@pytest.mark.parametrize("arguments", [("god", "bad_one"), ("bad_one", "god")])
def test_an_unknown_entry_is_told_the_nearest(results_dir, run, arguments):
    assert refused(run(*arguments)) == f"{results_dir} has no completed run of god; the nearest is good."


def test_an_entry_of_which_no_run_was_completed_is_unknown(results_dir, run):
    publish(make_unfinished("diverged", "wild"), results_dir)
    assert "no completed run of wild" in refused(run("good", "wild"))


def test_an_entry_is_not_compared_with_itself(run):
    assert refused(run("good", "good")) == "good is compared with itself; name two entries."


@pytest.mark.parametrize(
    ("other", "flag"),
    [
        ({"dtype": "bfloat16"}, "--dtype=bfloat16"),
        ({"dtype": "bfloat16"}, "--condition=bfloat16"),
        ({"data_version": "old"}, "--condition=old"),
    ],
)
def test_of_several_conditions_one_must_be_chosen(results_dir, run, monkeypatch, other, flag):
    monkeypatch.setattr(command.leaderboard, "true_labels", lambda path, record: fake_dataset().test_labels)
    publish_all(results_dir, **other)
    said = refused(run("good", "bad_one"))
    assert f"(2 cores), float32, data of {VERSION}" in said
    assert said.endswith("; choose one of these with --dtype or --condition.")
    assert refused(run("good", "bad_one", "--dtype=int8")) == said
    title = "old data" if "data_version" in other else "bfloat16"
    assert title in run("good", "bad_one", flag)[1].splitlines()[-1]


def test_the_only_shared_condition_is_taken(results_dir, run):
    for seed in (0, 1):
        publish(make_record("good", seed, dtype="bfloat16"), results_dir)
    assert "float32" in run("good", "bad_one")[1]
    for seed in (0, 1):
        publish(make_record("elsewhere", seed, dtype="bfloat16"), results_dir)
    said = refused(run("elsewhere", "bad_one"))
    assert said.startswith("they were not run under one condition: elsewhere on 1 x Abacus 9 (2 cores), bfloat16")
    assert "bad_one on 1 x Abacus 9 (2 cores), float32" in said


def test_predictions_that_are_not_the_records_are_refused(results_dir, run):
    path = results_dir / "runs" / "good-cpu-abacus-9-2c-float32-seed0.npy"
    np.save(path, predictions_with(0))
    assert "not the predictions of good-cpu-abacus-9-2c-float32-seed0.json" in refused(run("good", "bad_one"))


def test_a_results_dir_that_is_none_is_refused(results_dir, run):
    said = refused(run("good", "bad_one", f"--results_dir={results_dir / 'no'}"))
    assert said == f"--results_dir={results_dir / 'no'} is not a directory."


def test_a_format_that_is_none_is_refused(run):
    assert "invalid choice: 'html'" in refused(run("good", "bad_one", "--format=html"))
