"""From records to tables: what is ranked with what, what is checked, what is written."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from fake_records import LABELS, VERSION, fake_dataset, make_record, make_unfinished, predictions_with, publish

from fmbench import leaderboard as command
from fmbench.data import fashion_mnist, proof
from fmbench.pages import leaderboard
from fmbench.records import schema, store
from fmbench.records.schema import RunRecord

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fake_data(monkeypatch):
    """Puts the small fake data set in the place of the real one."""
    versions = {"tfds": VERSION, "sample": "sample"}
    monkeypatch.setattr(fashion_mnist, "load", lambda source: fake_dataset(versions[source]))


@pytest.fixture
def results_dir(tmp_path) -> Path:
    """An empty results folder, in an otherwise empty folder."""
    results_dir = tmp_path / "results"
    results_dir.mkdir()
    return results_dir


@pytest.fixture
def run(results_dir, monkeypatch, capsys):
    """Runs `fmbench.leaderboard`: exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["leaderboard", f"--results_dir={results_dir}", *arguments])
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table's rows below its head, cell by cell."""
    blocks = re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in b.splitlines()[2:]] for b in blocks]


def table(results_dir: Path) -> list[list[str]]:
    """The only table."""
    (only,) = tables((results_dir / "leaderboard.md").read_text())
    return only


def csv_rows(results_dir: Path) -> list[dict[str, str]]:
    with (results_dir / "leaderboard.csv").open() as file:
        return list(csv.DictReader(file))


def snapshot(directory: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of every file."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The rows.


def test_a_row_shows_what_its_record_says(results_dir, run):
    publish(make_record(wrong=20), results_dir)
    assert run()[0] == 0
    assert table(results_dir) == [
        [
            "n = 1", "[mlp](../configs/mlp.py)", "384,854", "90.00 (1)", "85.00", "10.0", "20.0",
            "5.0 / 10.0 / miss", "1,000", "3.0",
        ]
    ]  # fmt: skip


def test_seeds_of_one_entry_make_one_row(results_dir, run):
    for seed, wrong, seconds in [(0, 10, 1.0), (1, 20, 2.0), (2, 30, 6.0)]:
        targets = {"90": seconds, "92": seconds if seed else None, "94": None}
        record = make_record(
            seed=seed, wrong=wrong, train_seconds=seconds, val_accuracy=1 - wrong / 100, time_to_target=targets
        )
        publish(record, results_dir, wrong=wrong)
    run()
    (row,) = table(results_dir)
    assert row[3] == "90.00 ± 5.00 (3)"  # of 95, 90 and 85 %
    assert row[4] == "80.00 ± 10.00"
    assert row[5] == "2.0"
    assert row[7] == "2.0 / 6.0 / miss"
    (line,) = csv_rows(results_dir)
    assert (line["num_seeds"], float(line["test_accuracy"])) == ("3", pytest.approx(0.9))
    assert float(line["test_accuracy_std"]) == pytest.approx(0.05)
    assert (line["time_to_90"], line["time_to_92"], line["time_to_94"]) == ("2.0", "6.0", "")


def test_rows_stand_by_accuracy_and_share_a_rank_where_the_test_cannot_tell(results_dir, run):
    # As in test_statistics: four more wrong are not enough for six pairs, twelve are.
    for entry, wrong in [("d", 20), ("b", 4), ("a", 16), ("c", 0)]:
        for seed in (0, 1):
            publish(make_record(entry, seed, wrong=wrong), results_dir, wrong=wrong)
    run()
    rows = [(row[0], row[1][1]) for row in table(results_dir)]
    assert rows == [("1", "c"), ("1", "b"), ("3", "a"), ("3", "d")]
    assert [(line["rank"], line["entry"]) for line in csv_rows(results_dir)] == rows


def test_a_single_seed_stands_where_it_came_without_a_rank(results_dir, run):
    for entry, wrong, num_seeds in [("a", 0, 1), ("b", 5, 2), ("c", 30, 1), ("d", 60, 2), ("e", 90, 1)]:
        for seed in range(num_seeds):
            publish(make_record(entry, seed, wrong=wrong), results_dir, wrong=wrong)
    run()
    rows = [(row[0], row[1][1]) for row in table(results_dir)]
    assert rows == [("n = 1", "a"), ("1", "b"), ("n = 1", "c"), ("2", "d"), ("n = 1", "e")]
    assert [line["rank"] for line in csv_rows(results_dir)] == ["", "1", "", "2", ""]


def test_the_watched_split_is_told(results_dir, run):
    publish(make_record("a", watched="test"), results_dir)
    publish(make_record("b", watched=None, val_accuracy=None, train_images_per_sec=None), results_dir)
    run()
    rows = {row[1][1]: row for row in table(results_dir)}
    assert rows["a"][7] == "5.0 / 10.0 / miss (test)"
    assert (rows["b"][7], rows["b"][4]) == ("-", "-")


def test_compile_time_is_a_cold_compiles(results_dir, run):
    publish(make_record("a", 0, compile_seconds=7.0), results_dir)
    publish(make_record("a", 1, compile_seconds=0.1, compile_cached=True), results_dir)
    publish(make_record("b", compile_seconds=0.1, compile_cached=True), results_dir)
    run()
    assert {row[1][1]: row[-1] for row in table(results_dir)} == {"a": "7.0", "b": "cached"}


@pytest.mark.parametrize(
    ("changes", "mark", "said"),
    [
        ({"git_dirty": True}, " \\*", "not exactly a commit"),
        ({"git_dirty": None}, " ‡", "is not known (git did not say)"),
        ({"git_dirty": None, "git_unknown": "git: <dubious> ownership"}, " ‡", "(git: &lt;dubious> ownership)"),
        ({"git_dirty": False}, "", ""),
    ],
)
def test_code_that_is_no_commit_is_marked_and_what_is_not_known_is_not_called_that(
    results_dir, run, changes, mark, said
):
    publish(make_record(), results_dir)
    publish(make_record(seed=1, environment=changes), results_dir)
    run()
    text = (results_dir / "leaderboard.md").read_text()
    assert f"(../configs/mlp.py){mark} |" in text
    assert said in text
    assert ("not exactly a commit" in text) == (mark == " \\*")


def test_a_run_of_several_conditions_is_in_no_table(results_dir, run):
    def processes(cores):
        steps = zip(("2", cores), (0, 5), (5, 10), strict=True)
        return [
            {"began": "2026", "first_step": first, "last_step": last, "conditions": {"cpu_cores": one}}
            for one, first, last in steps
        ]

    publish(make_record(seed=1, processes=processes("2")), results_dir)
    path = publish(make_record(seed=2, processes=processes("1|<b>")), results_dir)
    assert path.stem == "mlp-cpu-abacus-9-2c-float32-seed2-mixed"
    run()
    text = (results_dir / "leaderboard.md").read_text()
    tables, _, apart = text.partition("## Made under several conditions")
    assert "| n = 1 | [mlp]" in tables  # seed 1 alone
    assert "| mlp | 2 | 90.00 | 2 | cpu_cores: 2 -> 1\\|&lt;b> |" in apart
    assert (results_dir / "leaderboard.csv").read_text().count("mlp") == 3  # a single line
    ((entry,),) = leaderboard.entries_by_condition(store.read_all(results_dir)).values()
    assert [path.stem for path in entry] == ["mlp-cpu-abacus-9-2c-float32-seed1"]


# What is never ranked together, or at all.


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"data_version": "2018-01-01"},
        {"environment": {"device_kind": "Abacus 10", "cpu": "Abacus 10"}},
        {"environment": {"cpu_cores": 64}},
        {"environment": {"num_devices": 8}},
        {"environment": {"shared_by": 2}},
        {"environment": {"device_platform": "gpu", "device_kind": "NVIDIA H100"}},
    ],
    ids=str,
)
def test_runs_under_other_conditions_stand_in_another_table(results_dir, run, monkeypatch, other):
    if "data_version" in other:
        monkeypatch.setattr(leaderboard, "true_labels", lambda path, record: fake_dataset().test_labels)
    publish(make_record("a", wrong=0), results_dir, wrong=0)
    publish(make_record("b", wrong=100, **other), results_dir, wrong=100)
    assert run()[0] == 0
    text = (results_dir / "leaderboard.md").read_text()
    assert [[row[1][1] for row in rows] for rows in tables(text)] in ([["a"], ["b"]], [["b"], ["a"]])
    titles = re.findall(r"^## (.*)", text, flags=re.MULTILINE)
    assert len(set(titles)) == 2
    assert f"1 x Abacus 9 (2 cores), float32, data of {VERSION}" in titles


def test_runs_that_shared_their_machine_show_accuracies_and_no_times(results_dir, run):
    publish(make_record("mlp", environment={"shared_by": 2}), results_dir)
    assert run()[0] == 0
    page = (results_dir / "leaderboard.md").read_text()
    assert "## 1 x Abacus 9 (2 cores), float32, data of 2017-08-31, 2 runs at a time\n" in page
    (row,) = (line for line in page.splitlines() if "[mlp]" in line)
    assert [cell.strip() for cell in row.split("|")[4:-1]] == ["90.00 (1)", "85.00", "-", "-", "-", "-", "-"]
    (line,) = csv.DictReader((results_dir / "leaderboard.csv").open())
    assert (line["shared_by"], line["train_seconds"], line["train_core_seconds"], line["time_to_90"]) == (
        "2",
        "",
        "",
        "",
    )


def on_gpu(kind: str = "NVIDIA H100", *, watts: float | None = 700.0, clock: int | None = 1980) -> dict:
    accelerator = schema.Accelerator(kind=kind, power_limit_watts=watts, sm_clock_mhz=clock)
    return {"device_platform": "gpu", "device_kind": kind, "accelerators": [accelerator.model_dump()]}


@pytest.mark.parametrize(
    ("other", "title"),
    [
        (on_gpu(watts=350.0), "1 x NVIDIA H100 (350 W)"),
        (on_gpu(watts=None), "1 x NVIDIA H100"),
        (on_gpu("NVIDIA H100 MIG 1g.10gb"), "1 x NVIDIA H100 MIG 1g.10gb (700 W)"),
    ],
    ids=["power limit", "unknown limit", "slice"],
)
def test_gpus_of_other_limits_and_slices_stand_in_another_table(results_dir, run, other, title):
    publish(make_record("a", wrong=0, environment=on_gpu()), results_dir, wrong=0)
    publish(make_record("b", wrong=100, environment=other), results_dir, wrong=100)
    assert run()[0] == 0
    text = (results_dir / "leaderboard.md").read_text()
    titles = [line.partition(",")[0] for line in re.findall(r"^## (.*)", text, flags=re.MULTILINE)]
    assert sorted(titles) == sorted(["1 x NVIDIA H100 (700 W)", title])


def test_a_gpus_driver_libraries_and_clocks_stand_above_its_table(results_dir, run):
    for seed, clock in enumerate((1980, 1410, None)):
        versions = {"jax": "0.12.0", "NVIDIA driver": f"580.{seed}", "CUDA": "13.0", "cuDNN": "9.12.0"}
        environment = on_gpu(clock=clock) | {"versions": versions}
        publish(make_record("a", seed, environment=environment), results_dir)
    assert run()[0] == 0
    sentence = (
        "NVIDIA driver 580.0, 580.1, 580.2; CUDA 13.0; cuDNN 9.12.0; SM clock 1410 to 1980 MHz at the runs' ends."
    )
    assert f"{VERSION}\n\n{sentence}\n\n| rank" in (results_dir / "leaderboard.md").read_text()


def test_one_core_is_a_singular(results_dir, run):
    publish(make_record("a", wrong=0, environment={"cpu_cores": 1}), results_dir, wrong=0)
    assert run()[0] == 0
    assert "## 1 x Abacus 9 (1 core), float32, data of" in (results_dir / "leaderboard.md").read_text()


def make_old(entry: str, wrong: int, train_images: str = "a" * 64, version: str = "old") -> RunRecord:
    sha256 = {"train-images": train_images, "t10k-labels": proof.sha256(LABELS)}
    return make_record(entry, wrong=wrong, data_version=version, data_sha256=sha256)


def publish_labels(results_dir: Path) -> Path:
    path = results_dir / "labels" / f"{proof.sha256(LABELS)}.npy"
    path.parent.mkdir()
    np.save(path, LABELS)
    return path


def test_runs_on_the_old_data_have_a_table_of_their_own_and_are_checked(results_dir, run):
    publish(make_record("a", wrong=0), results_dir, wrong=0)
    publish(make_record("b", wrong=10), results_dir, wrong=10)
    publish(make_old("a", wrong=20), results_dir, wrong=20)
    path = publish(make_old("b", wrong=40), results_dir, wrong=40)
    labels = publish_labels(results_dir)
    assert run() == (0, ANY, "")
    text = (results_dir / "leaderboard.md").read_text()
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == [
        f"1 x Abacus 9 (2 cores), float32, data of {VERSION}",
        "1 x Abacus 9 (2 cores), float32, old data (withdrawn 2017-08-31)",
    ]
    assert [[row[3] for row in rows] for rows in tables(text)] == [
        ["100.00 (1)", "95.00 (1)"],
        ["90.00 (1)", "80.00 (1)"],
    ]
    edit(path, test_accuracy=0.99)
    assert "test_accuracy is 0.99, but its predictions give 0.8" in run("--check")[2]
    labels.unlink()
    assert f"{labels}: cannot read the true labels" in run("--check")[2]


def test_different_old_data_are_not_ranked_together(results_dir, run):
    publish_labels(results_dir)
    publish(make_old("a", wrong=0), results_dir, wrong=0)
    publish(make_old("b", wrong=9, train_images="b" * 64), results_dir, wrong=9)
    code, _, err = run()
    assert code == 2
    assert "b-cpu-abacus-9-2c-float32-seed0-old.json were made on different data, both called version 'old'" in err


def test_other_data_have_a_page_of_their_own_and_are_checked(results_dir, run):
    publish_labels(results_dir)
    publish(make_record("a", wrong=0), results_dir, wrong=0)
    for version, wrong in (("unproven-00000000", 10), ("unproven-11111111", 20)):
        path = publish(make_old("theirs", wrong, version[-1] * 64, version), results_dir, wrong=wrong)
    publish(make_unfinished("interrupted", "stopped", data_version="unproven-00000000"), results_dir)
    assert run() == (0, ANY, "")
    text = (results_dir / "other_data.md").read_text()
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == [
        "1 x Abacus 9 (2 cores), float32, other data, unproven-00000000",
        "1 x Abacus 9 (2 cores), float32, other data, unproven-11111111",
        "Not finished",
    ]
    assert [[row[3] for row in rows] for rows in tables(text)][:2] == [["95.00 (1)"], ["90.00 (1)"]]
    for page in (results_dir / "leaderboard.md", results_dir / "leaderboard.csv"):
        assert "a](" in page.read_text() or page.suffix == ".csv"
        assert not re.search("theirs|stopped|unproven", page.read_text())
    edit(path, test_accuracy=0.99)
    assert "test_accuracy is 0.99, but its predictions give 0.9" in run("--check")[2]


def test_without_other_data_their_page_is_only_where_it_was(results_dir, run):
    publish(make_record("a", wrong=0), results_dir, wrong=0)
    assert run()[0] == 0
    assert not (results_dir / "other_data.md").exists()
    (results_dir / "other_data.md").write_text("records that were deleted")
    assert run("--check")[0] == 1
    assert run()[0] == 0
    assert not tables((results_dir / "other_data.md").read_text())


def test_standard_data_that_need_not_be_proven_are_of_one_row_with_the_others(results_dir, run):
    data = make_record().config["data"]
    publish(make_record("a", 0), results_dir)
    publish(
        make_record("a", 1, config={"data": data | {"source": "idx", "dir": "x", "unproven": True}}), results_dir
    )
    assert run()[0] == 0
    assert "| 90.00 ± 0.00 (2) |" in (results_dir / "leaderboard.md").read_text()


def test_the_sample_never_reaches_the_leaderboard(results_dir, run):
    publish(make_record("cheat", data_version="sample"), results_dir)
    publish(make_unfinished("interrupted", "cheat", 1, data_version="sample"), results_dir)
    assert run()[0] == 0
    for name in ("leaderboard.md", "leaderboard.csv"):
        assert "cheat" not in (results_dir / name).read_text()
    assert "No records yet" in (results_dir / "leaderboard.md").read_text()


@pytest.mark.parametrize("version", ["2018-01-01", VERSION])
def test_the_sample_cannot_pass_for_the_real_data(results_dir, run, monkeypatch, version):
    publish(make_record(data_version=version), results_dir)
    real = {**fake_dataset().sha256, "t10k-labels": "1" * 64}
    monkeypatch.setattr(fashion_mnist, "load", lambda source: dataclasses.replace(fake_dataset(), sha256=real))
    code, _, err = run("--check")
    assert code == 2
    assert f"mlp-cpu-abacus-9-2c-float32-seed0 was made on data of version {version}, not at hand here" in err


def test_the_data_are_read_and_proven_once_for_all_records(results_dir, run, monkeypatch):
    for seed in range(3):
        publish(make_record(seed=seed), results_dir)
    asked = iter(["tfds"])
    monkeypatch.setattr(fashion_mnist, "load", lambda source: {"tfds": fake_dataset()}[next(asked)])
    assert run()[0] == 0
    assert not [*asked]


def test_data_of_an_unknown_version_are_not_looked_for(results_dir, run, monkeypatch):
    publish(make_record(data_version="2018-01-01"), results_dir)
    monkeypatch.setattr(fashion_mnist, "load", lambda source: pytest.fail("it asked the network, perhaps"))
    code, _, err = run("--check")
    assert code == 2
    assert "was made on data of version 2018-01-01, not at hand here" in err


@pytest.mark.parametrize("status", ["interrupted", "diverged"])
def test_an_unfinished_run_is_listed_but_not_ranked(results_dir, run, status):
    publish(make_record(), results_dir)
    publish(make_unfinished(status, seed=1, num_epochs=0), results_dir)
    publish(make_unfinished(status, "vgg_like", num_epochs=0, config={"num_epochs": 50}), results_dir)
    run()
    ranked, unfinished = tables((results_dir / "leaderboard.md").read_text())
    assert [(row[1], row[3]) for row in ranked] == [("[mlp](../configs/mlp.py)", "90.00 (1)")]
    assert unfinished == [["mlp", "1", status, "0 of 1"], ["vgg_like", "0", status, "0 of 50"]]
    assert [line["num_seeds"] for line in csv_rows(results_dir)] == ["1"]


def test_even_a_tested_run_is_not_ranked_unless_completed(results_dir, run):
    publish(make_record(wrong=0, status="interrupted"), results_dir)
    run()
    assert table(results_dir) == [["mlp", "0", "interrupted", "1 of 1"]]
    assert csv_rows(results_dir) == []


def test_seeds_with_different_libraries_make_two_rows_and_those_of_different_commits_say_so(run, results_dir):
    for seed, versions in enumerate(("0.10.0", "0.10.0", "0.11.0")):
        environment = {"versions": {"jax": versions}, "git_commit": f"{seed}" * 40}
        publish(make_record(seed=seed, environment=environment), results_dir)
    assert run()[0] == 0
    text = (results_dir / "leaderboard.md").read_text()
    assert [n for n in ("(1)", "(2)", "(3)") if f"90.00 {n}" in text or f"0.00 {n}" in text] == ["(1)", "(2)"]
    assert "Seeds of one row that differ: mlp: commits 0000000, 1111111.\n" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"num_epochs": 9}}, "num_epochs: 1 -> 9"),
        ({"config": {"label_smoothing": 0.1}}, "label_smoothing: 0.0 -> 0.1"),
        ({"num_params": 7}, "num_params: 384854 -> 7"),
    ],
)
def test_different_configs_make_no_row(results_dir, run, change, said):
    publish(make_record(seed=0), results_dir)
    publish(make_record(seed=1, **change), results_dir)
    code, _, err = run()
    assert code == 2
    assert "mlp-cpu-abacus-9-2c-float32-seed0" in err
    assert f"mlp-cpu-abacus-9-2c-float32-seed1.json are runs of different configs ({said})" in err


@pytest.mark.parametrize(("ema_decay", "code"), [(0.0, 0), (0.9, 2)])
def test_a_field_that_an_older_record_lacks_had_its_default(results_dir, run, ema_decay, code):
    older = make_record(seed=0)
    del older.config["ema_decay"], older.config["selection"]["easy"]
    publish(older, results_dir)
    publish(make_record(seed=1, config={"ema_decay": ema_decay}), results_dir)
    assert run()[0] == code
    if code:
        assert "different configs (ema_decay: 0.0 -> 0.9)" in run()[2]
    else:
        assert table(results_dir)[0][3] == "90.00 ± 0.00 (2)"


def test_seeds_may_find_the_data_in_different_places(results_dir, run):
    for seed, place in enumerate([{"dir": None}, {"dir": "here"}, {"source": "csv", "dir": "there"}]):
        data = make_record().config["data"] | place
        publish(make_record(seed=seed, config={"data": data}), results_dir)
    assert run()[0] == 0
    assert table(results_dir)[0][3] == "90.00 ± 0.00 (3)"


def test_a_copied_record_is_no_further_seed(results_dir, run):
    path = publish(make_record(), results_dir)
    copy = path.with_name(path.name.replace("seed0", "seed1"))
    copy.write_bytes(path.read_bytes())
    assert "its content says mlp-cpu-abacus-9-2c-float32-seed0" in run("--check")[2]
    edit(copy, seed=1)
    code, _, err = run("--check")
    assert code == 2
    assert "seed is 1, but config.seed 0" in err


# --check.


@pytest.fixture
def published(results_dir, run) -> Path:
    """A results folder as it should be; the record's path."""
    path = publish(make_record(), results_dir)
    assert run()[0] == 0
    return path


def test_check_agrees_with_what_was_just_written(published, run):
    before = snapshot(published.parents[2])
    code, out, err = run("--check")
    assert (code, err) == (0, "")
    assert out.startswith("The records agree")
    assert snapshot(published.parents[2]) == before


@pytest.mark.parametrize("name", ["results/leaderboard.md", "results/leaderboard.csv"])
def test_check_names_a_file_that_is_out_of_date_and_mends_nothing(published, run, name):
    stale = published.parents[2] / name
    stale.write_text(stale.read_text().replace("90.00", "99.00").replace("0.9,", "0.99,"))
    before = snapshot(published.parents[2])
    code, _, err = run("--check")
    assert code == 1
    assert err == f"{stale} is not what the records say; run python -m fmbench.leaderboard.\n"
    assert snapshot(published.parents[2]) == before


@pytest.mark.parametrize("name", ["leaderboard.md", "leaderboard.csv"])
def test_check_names_a_missing_file(published, run, name):
    (published.parents[1] / name).unlink()
    code, _, err = run("--check")
    assert code == 1
    assert name in err
    assert not (published.parents[1] / name).exists()


def test_check_notices_a_new_record(published, results_dir, run):
    publish(make_record(seed=1), results_dir)
    assert run("--check")[0] == 1


@pytest.mark.parametrize("arguments", [[], ["--check"]])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test_accuracy": 0.95}, "test_accuracy is 0.95, but its predictions give 0.9"),
        ({"test_accuracy": 0.9000001}, "test_accuracy is 0.9000001"),
        ({"test_per_class_accuracy": [0.9] * 10}, "test_per_class_accuracy is"),
        ({"num_test": 100}, "mlp-cpu-abacus-9-2c-float32-seed0 was made on data"),
        ({"test_accuracy": None}, "test_accuracy is missing from a completed run"),
    ],
)
def test_an_accuracy_that_the_predictions_do_not_give_is_named(published, run, arguments, change, said):
    edit(published, **change)
    before = snapshot(published.parents[2])
    code, _, err = run(*arguments)
    assert code == 2
    assert said in err
    assert "mlp-cpu-abacus-9-2c-float32-seed0" in err
    assert snapshot(published.parents[2]) == before


def test_predictions_that_are_not_the_records_are_named(published, run):
    np.save(published.with_suffix(".npy"), predictions_with(wrong=19))
    code, _, err = run("--check")
    assert code == 2
    assert (
        "mlp-cpu-abacus-9-2c-float32-seed0.npy: not the predictions of mlp-cpu-abacus-9-2c-float32-seed0.json"
        in err
    )


def test_missing_predictions_are_named(published, run):
    published.with_suffix(".npy").unlink()
    code, _, err = run("--check")
    assert code == 2
    assert "mlp-cpu-abacus-9-2c-float32-seed0.npy: cannot read the predictions" in err


def test_better_predictions_with_their_own_hash_need_their_own_accuracy(published, run):
    better = predictions_with(wrong=0)
    np.save(published.with_suffix(".npy"), better)
    edit(published, predictions_sha256=schema.predictions_sha256(better))
    assert "but its predictions give 1.0" in run("--check")[2]


def test_a_damaged_record_is_one_line(published, run):
    published.write_text("{")
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith(f"fmbench.leaderboard: {published}: not a valid record, field 'file'")


# Folders.


def test_no_records_make_an_empty_leaderboard(results_dir, run):
    assert run()[0] == 0
    assert "No records yet" in (results_dir / "leaderboard.md").read_text()
    assert (results_dir / "leaderboard.csv").read_text() == ""
    assert run("--check")[0] == 0


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_a_results_dir_that_is_none_is_refused(results_dir, run, kind):
    results_dir.rmdir()
    if kind == "file":
        results_dir.write_text("")
    code, _, err = run()
    assert code == 2
    assert err == f"fmbench.leaderboard: --results_dir={results_dir} is not a directory.\n"


def test_a_file_that_cannot_be_written_is_one_line(results_dir, run):
    (results_dir / "leaderboard.md").mkdir()
    code, _, err = run()
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "leaderboard.md" in err
    assert [path.name for path in results_dir.iterdir()] == ["leaderboard.md"]


def test_the_command_works_in_a_terminal_that_knows_only_ascii(results_dir):
    publish(make_unfinished("diverged"), results_dir)  # for which no labels are needed
    for path, text in command._files(results_dir).items():
        path.write_bytes(text.encode())
    process = subprocess.run(
        [sys.executable, "-m", "fmbench.leaderboard", f"--results_dir={results_dir}", "--check"],
        cwd=REPOSITORY,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("The records agree")


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "python -m fmbench.leaderboard --check" in out
