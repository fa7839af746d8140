"""Two entries held against each other: which records are taken, what is said in which format, what is refused."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_records import VERSION, fake_dataset, make_record, make_unfinished, predictions_with, publish

from fmbench import compare as command
from fmbench.data import fashion_mnist
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
