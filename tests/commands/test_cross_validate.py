"""Folds, their scores, and what is said of them: trained on the sample, and worked out from records made up."""

import dataclasses
import json
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_records import EPOCH, VERSION, fake_dataset, make_record, publish
from sklearn.model_selection import KFold

from fmbench import config as config_lib
from fmbench import cross_validate, entries
from fmbench.data import fashion_mnist
from fmbench.pages import drawing
from fmbench.records import schema, store
from fmbench.reporting.metrics import MetricWriter
from fmbench.studies import cross_validation
from fmbench.system import runtime
from fmbench.training import input_pipeline, parallel

# ml_collections loads config files in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

TINY = """
from fmbench.config import base_config


def get_config(learning_rate="0.1"):
    config = base_config()
    config.model.name = "fully_connected"
    config.model.widths, config.model.num_dropouts = (16,), 0
    config.data.source = "sample"
    config.data.split = "all"
    config.watch = "none"
    config.batch_size = 80
    config.num_epochs = 9
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = float(learning_rate)
    return config
"""

# Reference system R0's published folds, in percent.
BASELINE = (91.200, 91.217, 90.958, 91.242, 91.317)
SAME = (90.875, 91.442, 91.242, 91.275, 91.450)
SAME64 = (90.917, 90.908, 90.175, 91.158, 91.408)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `fmbench.cross_validate`: exit code, standard output and standard error."""
    monkeypatch.setattr(runtime, "set_up", lambda: None)  # it is for a process of its own
    mesh = parallel.make_mesh(jax.devices()[:1])  # for one device less is to be compiled
    monkeypatch.setattr(parallel, "make_mesh", lambda *devices: mesh)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cross_validate", *map(str, arguments)])
        code = 0
        try:
            cross_validate.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def little(tmp_path_factory) -> Path:
    """A config file whose argument is the learning rate."""
    path = tmp_path_factory.mktemp("configs") / "tests_little.py"
    path.write_text(TINY)
    return path


def places(path: Path) -> tuple[str, str]:
    return f"--workdir={path / 'work'}", f"--results_dir={path / 'results'}"


# The folds.


def test_the_folds_are_scikit_learns(little):
    entry = entries.from_arguments([f"--config={little}", "--config.seed=3"])
    dataset = fashion_mnist.load("sample")
    mesh = parallel.make_mesh()
    folds = KFold(4, shuffle=True, random_state=1).split(dataset.train_images)
    for fold, (train_rows, held_out) in enumerate(folds):
        fold_config = cross_validation.fold_config(entry, fold, 4)
        assert (fold_config.entry, fold_config.seed) == (f"tests_little+fold={fold + 1}of4", 3)
        data = input_pipeline.load(fold_config, mesh)
        assert data.watched == "validation"
        np.testing.assert_array_equal(data.train_indices, train_rows)
        (batch,) = data.eval_batches["validation"]
        np.testing.assert_array_equal(batch["label"][0, : len(held_out)], dataset.train_labels[held_out])
        np.testing.assert_array_equal(
            batch["image"][0, : len(held_out)], dataset.train_images[held_out].reshape(-1, 784)
        )
    assert (entry.entry, entry.data.split) == ("tests_little", "all")  # as it was


@pytest.mark.slow
def test_folds_are_trained_scored_compared_and_go_on_after_an_interruption(run, little, tmp_path, monkeypatch):
    configs = (f"--config={little}", f"--config={little}:0.01")
    command: tuple[str, ...] = (*configs, "--folds=2", "--config.num_epochs=2")
    code, out, err = run(*command, *places(tmp_path / "undisturbed"))
    assert code == 0, err
    results_dir = tmp_path / "undisturbed" / "results"
    for name in ("tests_little+num_epochs=2", "tests_little-0.01+num_epochs=2"):
        runs = [
            store.read(*(results_dir / "runs").glob(f"{name}+fold={fold}of2-cpu-*-x8-float32-seed0.json"))
            for fold in (1, 2)
        ]
        assert [(run.num_train, run.num_validation, run.num_epochs) for run in runs] == [(240, 240, 2)] * 2
        first, second = (100 * (run.history[-1].val_accuracy or 0) for run in runs)
        assert out.count(f"{name} seed 0\nfold 1/2: {first:.3f} %\nfold 2/2: {second:.3f} %\n") == 1
        # The population's standard deviation of two values is half their distance.
        assert out.count(f"mean {(first + second) / 2:.3f} % ± {abs(first - second) / 2:.3f} (n=2)\n") == 1
        (curves,) = results_dir.glob(f"{name}-cpu-*-x8-float32-seed0-learning_curves.png")
        assert curves.stat().st_size > 0
    assert (results_dir / "box_plot.png").stat().st_size > 0
    assert "tests_little-0.01+num_epochs=2 minus tests_little+num_epochs=2: " in out
    code, out_of_check, _ = run("--check", *places(tmp_path / "undisturbed"))
    assert code == 0
    assert "the scores of 2 follow from their predictions, those of 0 are self-reported" in out_of_check

    # The first config again, interrupted in the middle of its second fold.
    write = MetricWriter.write
    epochs = []

    def write_and_interrupt(self, **epoch):
        write(self, **epoch)
        epochs.append(epoch)
        if len(epochs) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MetricWriter, "write", write_and_interrupt)
    command = (command[0], *command[2:])
    assert run(*command, *places(tmp_path))[0] == 130
    assert not (tmp_path / "results" / "summary.md").exists()
    folds = sorted((tmp_path / "results" / "runs").glob("*.json"))
    assert [store.read(path).status for path in folds] == ["completed", "interrupted"]
    finished = folds[0].read_bytes()

    code, resumed_out, err = run(*command, *places(tmp_path))
    assert code == 0, err
    assert len(epochs) == 4  # two in each of two folds, and none twice
    assert "tests_little+num_epochs=2+fold=1of2 seed 0: already finished" in resumed_out
    assert folds[0].read_bytes() == finished
    assert store.read(folds[1]).num_resumes == 1
    scores = re.findall(r"^(?:fold|mean) .*", resumed_out, re.MULTILINE)
    assert scores == re.findall(r"^(?:fold|mean) .*", out, re.MULTILINE)[:3]


def test_a_fold_that_diverges_ends_it(run, little, tmp_path):
    overrides = ("--config.num_epochs=1", "--config.optimizer.learning_rate=1e30")
    code, out, err = run(f"--config={little}", "--folds=2", *overrides, *places(tmp_path))
    assert code == 3
    assert "diverged" in err
    assert "%" not in out
    assert len(list((tmp_path / "results" / "runs").glob("*.json"))) == 1


# What cannot be used.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing"),
        (["--config=nowhere.py"], "no config 'nowhere.py'"),
        (["--config=TINY", "--config=TINY:x"], "does not load: ValueError"),
        (["--config=TINY", "--config.num_epoch=1"], "config has no field 'num_epoch'; the nearest are num_epochs"),
        (["--config=TINY", "--config.num_epochs=0"], "config.num_epochs is 0; it must be at least 1"),
        (["--config=TINY", "--fold=3"], "there is no flag --fold; the nearest are --folds"),
        (["--config=TINY", "--folds=1"], "--folds=1: at least 2 are needed"),
        (["--config=TINY", "--folds=481"], "KFold refuses num_folds=481"),
        (["--config=TINY", "--config.data.fold", "1"], "--config.data.fold is decided by the cross-validation"),
        (["--config=TINY", "--config.watch=test"], "--config.watch is decided by the cross-validation"),
        (["--check"], "results is not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(run, little, tmp_path, arguments, said):
    code, _, err = run(*(text.replace("TINY", str(little)) for text in arguments), *places(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("fmbench.cross_validate: ")
    assert said in err
    assert not (tmp_path / "results").exists()


def test_check_takes_no_config(run, little, tmp_path):
    code, _, err = run("--check", f"--config={little}", *places(tmp_path))
    assert code == 2
    assert "give them no --config" in err


# From records to the summary.


@pytest.fixture
def results_dir(tmp_path, monkeypatch) -> Path:
    """An empty results folder; the small fake data set is in the place of the real one, and no figure is drawn."""
    monkeypatch.setattr(drawing, "save", lambda figure, path: path.touch())
    monkeypatch.setattr(fashion_mnist, "load", lambda source: fake_dataset(VERSION))
    results_dir = tmp_path / "results"
    (results_dir / "runs").mkdir(parents=True)
    return results_dir


def fold_record(entry: str, fold: int, percent: float, *, num_folds: int = 5, **changes) -> schema.RunRecord:
    """The record of a fold, counted from 1, with this score; `changes` of its config are of top-level fields."""
    default = config_lib.to_json(config_lib.base_config())["data"]
    decided = {"split": "kfold", "num_folds": num_folds, "fold": fold - 1, "random_state": 1}
    config = {"config_file": f"configs/{entry}.py", "data": default | decided} | changes.pop("config", {})
    score = percent / 100
    return make_record(
        f"{entry}+fold={fold}of{num_folds}",
        **{
            "config": config,
            "val_accuracy": score,
            "history": [EPOCH | {"val_accuracy": 0.5}, EPOCH | {"epoch": 2, "val_accuracy": score}],
            "num_train": 48_000,
            "num_validation": 12_000,
            **changes,
        },
    )


def publish_folds(results_dir: Path, entry: str, percents: tuple[float, ...], **changes) -> list[Path]:
    return [
        publish(fold_record(entry, fold, percent, num_folds=len(percents), **changes), results_dir)
        for fold, percent in enumerate(percents, 1)
    ]


def test_the_summary_has_the_references_numbers(run, results_dir):
    publish_folds(results_dir, "same", SAME, train_core_seconds=300.0)
    publish_folds(results_dir, "baseline", BASELINE)
    code, out, err = run("--render", f"--results_dir={results_dir}")
    assert code == 0, err
    text = (results_dir / "summary.md").read_text()
    assert "## 1 x Abacus 9 (2 cores), float32, data of 2017-08-31\n" in text
    baseline, same = (line.split(" | ") for line in text.splitlines() if line.startswith("| ["))
    assert baseline[:7] == [
        "| [baseline](../../configs/baseline.py) †",
        "384,854",
        "5",
        "91.200 91.217 90.958 91.242 91.317",
        "91.187 ± 0.121",
        "90.958..91.317",
        "100.0",
    ]
    assert same[0] == "| [same](../../configs/same.py) †"
    assert same[4:7] == ["91.257 ± 0.209", "90.875..91.450", "1,500.0"]
    # Worked out with scipy: mean 0.07, s 0.240, variance factor 1/5 + 1/4, t(0.975, df=4) = 2.776.
    sentence = (
        "same minus baseline: +0.07 points, 95 % interval -0.38..+0.52, p = 0.69: "
        "the 5 folds cannot tell them apart."
    )
    assert f"- {sentence}\n" in text
    assert sentence in out
    assert (results_dir / "same-cpu-abacus-9-2c-float32-seed0-learning_curves.png").exists()
    assert run("--check", f"--results_dir={results_dir}")[0] == 0


def test_an_outlier_that_rows_of_a_seed_share_is_told_once(run, results_dir):
    low = (90.0, 91.0, 91.2, 91.1, 91.3)
    publish_folds(results_dir, "first", low)
    publish_folds(results_dir, "second", (89.0, *low[1:3], 91.4, 91.3))
    publish_folds(results_dir, "first", (91.5, *low[1:]), seed=1)
    _, out, _ = run("--render", f"--results_dir={results_dir}")
    told = "Fold 1 is the lowest of all 2 rows of seed 0, which share its images and the seed: one event, not 2."
    assert f"- {told}\n" in (results_dir / "summary.md").read_text()
    assert [line for line in out.splitlines() if line.startswith("Fold ")] == [told]


def test_several_pairs_are_judged_by_holms_correction(run, results_dir):
    # A constant difference but for a little noise; that of the last fold alone decides how sure it is.
    better = tuple(score + 1 for score in BASELINE[:4])
    publish_folds(results_dir, "baseline", BASELINE)
    publish_folds(results_dir, "better", (*better, BASELINE[4] + 0.6))
    publish_folds(results_dir, "perhaps", (*better, BASELINE[4] - 0.4))
    _, out, _ = run("--render", f"--results_dir={results_dir}")
    sentences = [line for line in out.splitlines() if "points" in line]
    assert len(sentences) == 3
    assert sentences[0].startswith("better minus baseline: +0.92 points, ")
    assert sentences[0].endswith(" with Holm's correction for 3 pairs: the difference is real.")
    plain, corrected = (float(p) for p in re.findall(r"p = ([\d.]+)", sentences[0]))
    assert corrected == pytest.approx(3 * plain, rel=0.1)
    # Significant alone, but no more with two others.
    publish_folds(results_dir, "better", (*better, BASELINE[4] + 0.1))
    _, out, _ = run("--render", f"--results_dir={results_dir}")
    sentence = next(line for line in out.splitlines() if line.startswith("better minus baseline"))
    plain, corrected = (float(p) for p in re.findall(r"p = ([\d.]+)", sentence))
    assert plain < 0.05 < corrected
    assert sentence.endswith(": the 5 folds cannot tell them apart.")


def test_seeds_and_conditions_stand_apart(run, results_dir):
    publish_folds(results_dir, "baseline", BASELINE)
    publish_folds(results_dir, "baseline", SAME, seed=1)
    publish_folds(results_dir, "baseline", SAME64, dtype="bfloat16")
    _, out, _ = run("--render", f"--results_dir={results_dir}")
    text = (results_dir / "summary.md").read_text()
    assert re.findall("^## .*", text, re.MULTILINE) == [
        "## 1 x Abacus 9 (2 cores), bfloat16, data of 2017-08-31",
        "## 1 x Abacus 9 (2 cores), float32, data of 2017-08-31",
    ]
    # No comparison across dtypes.
    assert [line.partition(":")[0] for line in out.splitlines() if "points" in line] == [
        "baseline (seed 1) minus baseline"
    ]
    assert len(list(results_dir.glob("*-learning_curves.png"))) == 3


def test_fold_10_comes_after_fold_9(run, results_dir):
    publish_folds(results_dir, "baseline", tuple(80.0 + fold for fold in range(11)))
    run("--render", f"--results_dir={results_dir}")
    assert "| 11 | 80.000 81.000 82.000 " in (results_dir / "summary.md").read_text()


def test_training_from_changed_code_is_marked(run, results_dir):
    publish_folds(results_dir, "baseline", BASELINE)
    publish(fold_record("baseline", 2, 91.2, environment={"git_dirty": True}), results_dir)
    run("--render", f"--results_dir={results_dir}")
    assert "[baseline](../../configs/baseline.py) \\* † |" in (results_dir / "summary.md").read_text()


def test_without_records_the_summary_says_how_to_make_them(run, results_dir):
    assert run("--render", f"--results_dir={results_dir}")[0] == 0
    assert "No records yet" in (results_dir / "summary.md").read_text()


def fake_folds(results_dir: Path, monkeypatch, *, version: str = VERSION) -> list[Path]:
    """Five folds of 20 train images each, of which the k-th net gets k wrong, with their predictions."""
    labels = np.tile(np.arange(10, dtype=np.uint8), 10)
    dataset = dataclasses.replace(fake_dataset(version), train_labels=labels)
    monkeypatch.setattr(fashion_mnist, "load", lambda source: dataset)
    paths = []
    for fold, (_, rows) in enumerate(KFold(5, shuffle=True, random_state=1).split(labels), 1):
        predictions = labels[rows]
        predictions[:fold] += 1
        sha256 = schema.predictions_sha256(predictions)
        score = 100 * (1 - fold / 20)
        record = fold_record("baseline", fold, score, num_validation=20, val_predictions_sha256=sha256)
        path = publish(record, results_dir)
        np.save(path.with_suffix(".validation.npy"), predictions)
        paths.append(path)
    return paths


def test_scores_follow_from_the_predictions_of_the_held_out_images(run, results_dir, monkeypatch):
    paths = fake_folds(results_dir, monkeypatch)
    assert run("--render", f"--results_dir={results_dir}")[0] == 0
    text = (results_dir / "summary.md").read_text()
    assert "| 5 | 95.000 90.000 85.000 80.000 75.000 | 85.000 ± 7.071 |" in text
    assert "self-reported" not in text
    code, out, _ = run("--check", f"--results_dir={results_dir}")
    assert (code, "the scores of 1 follow from their predictions, those of 0 are self" in out) == (0, True)

    record = json.loads(paths[2].read_text())
    first, last = record["history"]
    edit(paths[2], val_accuracy=0.999, history=[first, last | {"val_accuracy": 0.999}])
    for flag in ("--check", "--render"):
        code, _, err = run(flag, f"--results_dir={results_dir}")
        assert (code, err.count("\n")) == (2, 1)
        assert f"{paths[2]}: val_accuracy is 0.999, but its predictions of the held-out images give 0.85" in err
    paths[2].write_text(json.dumps(record))
    np.save(paths[2].with_suffix(".validation.npy"), np.zeros(20, np.uint8))
    code, _, err = run("--check", f"--results_dir={results_dir}")
    assert (code, "not the predictions of baseline+fold=3of5-cpu-abacus-9-2c-float32-seed0.json" in err) == (
        2,
        True,
    )
    paths[2].with_suffix(".validation.npy").unlink()
    assert "cannot read the predictions" in run("--check", f"--results_dir={results_dir}")[2]


def test_scores_without_predictions_are_said_to_be_self_reported(run, results_dir, monkeypatch):
    paths = fake_folds(results_dir, monkeypatch)
    edit(paths[4], val_predictions_sha256=None)
    run("--render", f"--results_dir={results_dir}")
    text = (results_dir / "summary.md").read_text()
    assert "[baseline](../../configs/baseline.py) † |" in text
    assert "† Scores are self-reported" in text
    assert "those of 1 are self-reported" in run("--check", f"--results_dir={results_dir}")[1]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def summary_of(paths: list[Path]) -> Path:
    return paths[0].parents[1] / "summary.md"


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (lambda paths: paths[2].with_suffix(".npy").unlink(), 2, "cannot read the predictions"),
        (lambda paths: edit(paths[2], test_accuracy=0.95), 2, "test_accuracy is 0.95, but its predictions give"),
        (lambda paths: edit(paths[2], val_accuracy=0.95), 2, "val_accuracy is 0.95, but that of the last epoch"),
        (lambda paths: paths[2].unlink(), 2, "cannot be compared: no completed record of fold 3 of 5"),
        (lambda paths: summary_of(paths).write_text("# Cross-validation"), 1, "is not what the records say"),
        (lambda paths: summary_of(paths).unlink(), 1, "is not what the records say"),
    ],
    ids=["no predictions", "test accuracy", "score", "no fold", "another summary", "no summary"],
)
def test_check_finds_what_is_not_as_the_records_say(run, results_dir, spoil, code, said):
    paths = publish_folds(results_dir, "baseline", BASELINE)
    publish_folds(results_dir, "same", SAME)
    assert run("--render", f"--results_dir={results_dir}")[0] == 0
    spoil(paths)
    found, out, err = run("--check", f"--results_dir={results_dir}")
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1


def refused(run, results_dir: Path) -> str:
    code, _, err = run("--render", f"--results_dir={results_dir}")
    assert (code, err.count("\n")) == (2, 1)
    return err


def test_missing_and_unfinished_folds_are_named(run, results_dir):
    paths = publish_folds(results_dir, "baseline", BASELINE)
    paths[1].unlink()
    paths[3].unlink()
    publish(fold_record("baseline", 4, 90, status="interrupted"), results_dir)
    assert "no completed record of fold 2, 4 of 5. Cross-validate configs/baseline.py again" in refused(
        run, results_dir
    )


def test_other_numbers_of_folds_are_refused_before_and_after_training(run, results_dir, little, tmp_path):
    publish_folds(results_dir, "baseline", BASELINE)
    assert "scores over 3 and 5 folds" in run(f"--config={little}", "--folds=3", *places(tmp_path))[2]
    assert not (tmp_path / "work").exists()
    publish_folds(results_dir, "same", SAME[:3])
    assert "scores over 3 and 5 folds cannot be compared" in refused(run, results_dir)


def test_folds_of_different_configs_or_machines_are_refused(run, results_dir):
    publish_folds(results_dir, "baseline", BASELINE)
    publish(fold_record("baseline", 3, 91, config={"label_smoothing": 0.1}), results_dir)
    assert "are no folds of one cross-validation (label_smoothing: 0.0 -> 0.1)" in refused(run, results_dir)
    publish(fold_record("baseline", 3, 91), results_dir).unlink()
    publish(fold_record("baseline", 3, 91, environment={"cpu_cores": 4}), results_dir)
    assert "baseline-cpu-abacus-9-2c-float32-seed0 cannot be compared: no completed record of fold 3" in refused(
        run, results_dir
    )


@pytest.mark.parametrize(
    "record",
    [
        make_record("baseline"),
        fold_record("baseline", 1, 91, config={"watch": "test"}),
        fold_record("baseline", 1, 91, config={"data": {"num_folds": 5, "fold": 0}}),
        fold_record("baseline", 1, 91, config={"data": {}}),
    ],
    ids=["of fmbench.main", "another watched split", "another split", "old"],
)
def test_other_records_are_refused_before_and_after_training(run, results_dir, little, tmp_path, record):
    publish(record, results_dir)
    assert f"{record.name} is no record of fmbench.cross_validate" in refused(run, results_dir)
    code, _, err = run(f"--config={little}", *places(tmp_path))
    assert code == 2
    assert "is no record of fmbench.cross_validate" in err
    assert not (tmp_path / "work").exists()


def test_a_summary_that_cannot_be_written_is_named(run, results_dir):
    publish_folds(results_dir, "baseline", BASELINE)
    (results_dir / "summary.md").mkdir()
    assert "summary.md: cannot be written" in refused(run, results_dir)
