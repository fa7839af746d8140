"""An exported model says in a fresh process what the record of its run says, or evaluate notices."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from fake_records import make_record, make_unfinished
from flax import nnx

from fmbench import config, evaluate
from fmbench.data import fashion_mnist
from fmbench.models import MODELS, exported, split_model
from fmbench.records import schema, store
from fmbench.system import runtime

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_fresh_process_finds_what_the_run_recorded(run_main, tmp_path):
    # A convolution, and a last batch that is not full: 150 + 50.
    trained = run_main(
        "--config=configs/cnn1.py",
        "--config.data.source=sample",
        "--config.num_epochs=1",
        "--config.batch_size=192",
        "--config.eval_batch_size=150",
        f"--workdir={tmp_path / 'work'}",
        f"--results_dir={tmp_path / 'results'}",
    )
    assert trained.returncode == 0, trained.stderr
    process = subprocess.run(
        [sys.executable, "-m", "fmbench.evaluate", f"--model={tmp_path / 'work'}", "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    record = store.read(tmp_path / "work" / "record.json")
    found = json.loads(process.stdout)
    assert found["accuracy"] == record.test_accuracy
    assert found["loss"] == pytest.approx(record.test_loss, rel=1e-5)
    assert found["num_test"] == 200
    assert [found["per_class"][name]["recall"] for name in fashion_mnist.CLASS_NAMES] == pytest.approx(
        record.test_per_class_accuracy
    )
    assert found["record"] == {
        "accuracy": record.test_accuracy,
        "same_accuracy": True,
        "different_predictions": 0,
    }


@pytest.fixture(scope="module")
def dataset() -> fashion_mnist.Dataset:
    return fashion_mnist.load("sample")


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    return MODELS["mlp"](rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def logits(model, dataset) -> np.ndarray:
    """The model's on the test set, (200, 10), without any of fmbench's means."""
    return np.asarray(model(dataset.test_images.reshape(-1, 28, 28, 1) / np.float32(255)))


@pytest.fixture
def make_workdir(model, dataset, logits, tmp_path):
    """Makes the work directory of a run of the model; its record can be made to lie."""

    def make(*, predictions: np.ndarray | None = None, **changes) -> Path:
        description = {
            "model": {"name": "mlp"},
            "dtype": "float32",
            "normalization": "unit",
            "class_names": fashion_mnist.CLASS_NAMES,
        }
        exported.export_model(tmp_path / "model", *split_model(model)[1:], description)
        if predictions is None:
            predictions = logits.argmax(axis=1)
        data = config.to_json(config.base_config())["data"] | {"source": "sample"}
        honest = {
            "config": {"data": data, "eval_batch_size": 64},
            "data_version": dataset.version,
            "data_sha256": dataset.sha256,
            "test_accuracy": float((logits.argmax(axis=1) == dataset.test_labels).mean()),
            "predictions_sha256": schema.predictions_sha256(predictions),
        }
        store.write(make_record(**{**honest, **changes}), predictions, tmp_path / "record")
        return tmp_path

    return make


@pytest.fixture
def run_evaluate(monkeypatch, capsys):
    """Runs `fmbench.evaluate` here: exit code, standard output and standard error."""
    monkeypatch.setattr(runtime, "set_up", lambda: None)  # is for a process of its own

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            evaluate.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_numbers_are_those_of_all_test_images(make_workdir, logits, dataset, run_evaluate):
    code, out, err = run_evaluate("--model", make_workdir(), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    labels, predictions = dataset.test_labels, logits.argmax(axis=1)
    correct = predictions == labels
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    assert found["accuracy"] == correct.mean()
    assert found["loss"] == pytest.approx(-log_probabilities[np.arange(200), labels].mean(), rel=1e-5)
    assert (found["num_test"], found["data_version"]) == (200, "sample")
    assert list(found["per_class"]) == list(fashion_mnist.CLASS_NAMES)
    for label, of_class in enumerate(found["per_class"].values()):
        right, predicted = correct[labels == label].sum(), (predictions == label).sum()
        precision = right / predicted if predicted else 0
        assert of_class["precision"] == pytest.approx(precision)
        assert of_class["recall"] == pytest.approx(right / 20)
        assert of_class["f1-score"] == pytest.approx(2 * right / (predicted + 20))
        assert of_class["support"] == 20


def test_people_are_told_that_all_is_as_in_the_record(make_workdir, run_evaluate):
    workdir = make_workdir()
    code, out, err = run_evaluate("--model", workdir)
    assert (code, err) == (0, "")
    first, second, *report, accuracy, predictions = out.splitlines()
    assert first == f"{workdir}: 200 test images, data of sample"
    assert second.startswith("accuracy ")
    assert ", loss " in second
    assert all(any(line.strip().startswith(name) for line in report) for name in fashion_mnist.CLASS_NAMES)
    assert (accuracy, predictions) == ("accuracy as in the record", "all 200 predictions as in the record")


def test_every_different_prediction_is_counted(make_workdir, logits, run_evaluate):
    predictions = logits.argmax(axis=1)
    predictions[[0, 100, 199]] = (predictions[[0, 100, 199]] + 1) % 10
    code, out, _ = run_evaluate("--model", make_workdir(predictions=predictions))
    assert code == 1
    assert "accuracy as in the record\n3 of 200 predictions not as in the record\n" in out
    assert "made on 1 x Abacus 9 with jax 0.10.0" in out


def test_another_accuracy_is_a_difference(make_workdir, run_evaluate):
    workdir = make_workdir(test_accuracy=0.955)
    code, out, _ = run_evaluate("--model", workdir)
    assert code == 1
    assert "accuracy not as in the record, which says 95.50%\nall 200 predictions as in the record\n" in out
    code, out, _ = run_evaluate("--model", workdir, "--json")
    expected = {"accuracy": 0.955, "same_accuracy": False, "different_predictions": 0}
    assert (code, json.loads(out)["record"]) == (1, expected)


def test_an_exported_model_by_itself_meets_the_standard_data(make_workdir, dataset, run_evaluate, monkeypatch):
    load = mock.Mock(return_value=dataset)
    monkeypatch.setattr(fashion_mnist, "load", load)
    code, out, _ = run_evaluate("--model", make_workdir() / "model", "--data_dir=somewhere")
    assert code == 0
    load.assert_called_once_with("tfds", "somewhere", False, False)
    assert "record" not in out


def test_a_record_of_a_run_that_is_not_completed_is_none(make_workdir, dataset, run_evaluate, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", lambda *arguments: dataset)
    workdir = make_workdir()
    store.write(make_unfinished("interrupted"), None, workdir / "record")
    code, out, _ = run_evaluate("--model", workdir, "--json")
    assert (code, json.loads(out)["record"]) == (0, None)


@pytest.mark.parametrize(
    ("damage", "flags", "said"),
    [
        (lambda workdir: (workdir / "record.json").write_text("{"), [], "record.json: not a valid record"),
        (lambda workdir: (workdir / "record.npy").unlink(), [], "record.npy: cannot read the predictions"),
        (lambda workdir: (workdir / "model" / "model.json").unlink(), [], "holds no exported model"),
        (lambda workdir: None, ["--data_dir=/nowhere"], "drop data_dir='/nowhere'"),
    ],
    ids=["record", "predictions", "model", "data"],
)
def test_what_cannot_be_used_is_one_line(make_workdir, run_evaluate, damage, flags, said):
    workdir = make_workdir()
    damage(workdir)
    code, out, err = run_evaluate("--model", workdir, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("fmbench.evaluate: ")
    assert said in err
    assert err.count("\n") == 1


def test_other_data_than_the_records_are_refused(make_workdir, run_evaluate):
    workdir = make_workdir(data_version="old", data_sha256={"t10k-labels": "0" * 64})
    code, _, err = run_evaluate("--model", workdir)
    assert code == 2
    assert "is on data of old, these are sample; name the run's data in --data_dir." in err
