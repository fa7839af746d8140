"""Results in the forms of others: to the letter for a made-up record, and as their own readers take them."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_records import EPOCH, fake_dataset, make_record, make_unfinished, publish

from fmbench import results
from fmbench.data import fashion_mnist
from fmbench.exchange import dawnbench, hugging_face, mllog, timm

SECOND = EPOCH | {"epoch": 2, "step": 20, "train_seconds": 26.0, "gap_seconds": 1.5, "val_accuracy": 0.875}


@pytest.fixture(autouse=True)
def fake_data(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", lambda source: fake_dataset())


def two_epochs(**changes: Any):
    config = {"num_epochs": 2, "optimizer": {"name": "adam", "learning_rate": 0.001}}
    fields: dict[str, Any] = {
        "config": config,
        "num_epochs": 2,
        "num_steps": 20,
        "train_seconds": 36.0,
        "history": [EPOCH, SECOND],
    }
    return make_record(wrong=15, **fields | changes)


def test_timm():
    records = [
        make_record(seed=0, wrong=31),
        make_record("big", seed=1, wrong=20, num_trainable_params=1_014_450_000),
    ]
    head, *rows = timm.render(records).splitlines()
    # The first lines of timm's results/results-imagenet.csv are
    published = (
        "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation",
        'eva_giant_patch14_560.m30m_ft_in22k_in1k,89.786,10.214,98.992,1.008,"1,014.45",560,1.000,bicubic',
    )
    assert head == published[0]
    assert rows == [
        'big-cpu-abacus-9-2c-float32-seed1,90.000,10.000,99.000,1.000,"1,014.45",28,1.000,none',
        "mlp-cpu-abacus-9-2c-float32-seed0,84.500,15.500,99.000,1.000,0.38,28,1.000,none",
    ]
    (ours,), (theirs,) = csv.reader([rows[0]]), csv.reader([published[1]])
    for cell, other in zip(ours[1:-1], theirs[1:-1], strict=True):  # as many digits behind the point
        assert cell.partition(".")[2].isdigit() == other.partition(".")[2].isdigit()
        assert len(cell.partition(".")[2]) == len(other.partition(".")[2])


def test_dawnbench():
    tested = [EPOCH | {"test_accuracy": 0.5}, SECOND | {"test_accuracy": 0.925}]
    assert dawnbench.render(two_epochs(watched="test", history=tested)) == (
        "epoch\thours\ttop1Accuracy\n1\t0.002777777777777778\t50.0\n2\t0.01\t92.5\n"
    )
    # The accuracy on validation images is no entry of a column that is on test images.
    assert dawnbench.render(two_epochs()) == "epoch\thours\ttop1Accuracy\n2\t0.01\t92.5\n"


def test_mllog_to_the_letter():
    record = two_epochs(created="1970-01-01T00:01:40+00:00", wall_seconds=90.0)  # so it began after 10 s
    lines = mllog.render(record).splitlines()
    assert lines[1] == (
        ':::MLLOG {"namespace": "", "time_ms": 10000, "event_type": "INTERVAL_START", "key": "init_start", '
        '"value": null, "metadata": {}}'
    )
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    assert {tuple(event) for event in events} == {
        ("namespace", "time_ms", "event_type", "key", "value", "metadata")
    }
    settings = {event["key"]: event["value"] for event in events if event["time_ms"] == 10_000}
    assert (
        settings | {"seed": 0, "global_batch_size": 256, "train_samples": 55_000, "eval_samples": 200} == settings
    )
    assert (settings["opt_name"], settings["opt_base_learning_rate"]) == ("adam", 0.001)
    first, second = {"epoch_num": 1}, {"epoch_num": 2}
    validation, test = {"split": "validation"}, {"split": "test"}
    assert [(e["time_ms"], e["key"], e["value"], e["metadata"]) for e in events if e["time_ms"] > 10_000] == [
        (14_000, "init_stop", None, {}),  # 1 s of setup, 3 of compilation
        (14_000, "run_start", None, {}),
        (14_000, "epoch_start", None, first),
        (24_000, "epoch_stop", None, first),
        (24_000, "tracked_stats", {"throughput": 1000.0}, first),
        (24_000, "eval_start", None, first),
        (25_500, "eval_accuracy", 0.85, first | validation),
        (25_500, "eval_stop", None, first),
        (25_500, "epoch_start", None, second),
        (51_500, "epoch_stop", None, second),
        (51_500, "tracked_stats", {"throughput": 1000.0}, second),
        (51_500, "eval_start", None, second),
        (51_500, "eval_accuracy", 0.875, second | validation),  # the gap has all seconds of evaluation
        (51_500, "eval_accuracy", 0.925, second | test),
        (51_500, "eval_stop", None, second),
        (51_500, "run_stop", None, {"status": "success"}),
    ]


def test_mllog_passes_mlperfs_own_checker(tmp_path):
    checker = pytest.importorskip(
        "mlperf_logging.compliance_checker.mlp_compliance",
        reason="pip install mlperf-logging for MLPerf's checker",
    )
    from mlperf_logging.compliance_checker import mlp_parser

    path = tmp_path / "result_0.txt"
    path.write_text(mllog.render(two_epochs()))
    lines, failed = mlp_parser.parse_file(str(path), ruleset="5.1.0")
    assert (len(lines), failed) == (path.read_text().count("\n"), [])
    check = checker.ComplianceChecker("training", "5.1.0", True, True)
    check.configured_checks(lines, str(Path(checker.__file__).parent / "training_5.1.0" / "common.yaml"))
    assert not check.has_messages()


def test_hugging_face_to_the_letter():
    assert yaml.safe_load(hugging_face.render([two_epochs()])) == {
        "model-index": [
            {
                "name": "mlp-cpu-abacus-9-2c-float32-seed0",
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image Classification"},
                        "dataset": {
                            "type": "zalando-datasets/fashion_mnist",
                            "name": "Fashion-MNIST",
                            "split": "test",
                        },
                        "metrics": [
                            {"type": "accuracy", "value": 0.925, "name": "Test accuracy"},
                            {"type": "accuracy", "value": 0.99, "name": "Test top-5 accuracy"},
                            {"type": "loss", "value": 0.4, "name": "Test loss"},
                        ],
                    }
                ],
            }
        ]
    }


def test_hugging_faces_own_reader_takes_the_card():
    hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub for its reader of cards")
    record = two_epochs(
        config_file="configs/`<b>x</b>.py", config={"config_file": "configs/`<b>x</b>.py", "num_epochs": 2}
    )
    text = hugging_face.card(record, {"model.onnx": "the net"}, "Compared.", 1.25)
    data = hub.ModelCard(text).data
    assert (data.license, data.datasets, data.metrics) == ("apache-2.0", [hugging_face.DATASET], ["accuracy"])
    assert [(one.metric_name, one.metric_value) for one in data.eval_results] == [
        ("Test accuracy", 0.925),
        ("Test top-5 accuracy", 0.99),
        ("Test loss", 0.4),
    ]
    assert data.to_dict()["model-index"] == yaml.safe_load(text.split("---\n")[1])["model-index"]
    assert "divided by 1.25" in text
    assert "<b>" not in text


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `fmbench.results` on records of which one is unfinished: code, output, errors."""
    for seed, wrong in enumerate((20, 30)):
        publish(make_record(seed=seed, wrong=wrong), tmp_path / "results", wrong=wrong)
    publish(make_unfinished("diverged", seed=2), tmp_path / "results")

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["results", f"--results_dir={tmp_path / 'results'}", *map(str, arguments)]
        )
        code = 0
        try:
            results.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_all_of_a_folder_or_one(run, tmp_path):
    code, out, _ = run("--format=timm")
    assert (code, out.count("\n")) == (0, 3)
    paths = sorted((tmp_path / "results" / "runs").glob("*.json"))
    code, out, _ = run("--format=dawnbench", paths[0], f"--output={tmp_path / 'one.tsv'}")
    assert (code, out) == (0, f"{tmp_path / 'one.tsv'} written.\n")
    assert (tmp_path / "one.tsv").read_text().startswith("epoch\thours\ttop1Accuracy\n1\t")
    code, _, err = run("--format=mllog")
    assert code == 2 and "--format=mllog is the form of one run; name the file of its record." in err
    code, _, err = run("--format=mllog", paths[2])
    assert code == 2 and "is of a run that is diverged" in err


def test_a_record_that_its_predictions_contradict_is_refused(run, tmp_path):
    path = min((tmp_path / "results" / "runs").glob("*.json"))
    path.write_text(path.read_text().replace('"test_accuracy": 0.9,', '"test_accuracy": 0.95,'))
    code, out, err = run("--format=timm")
    assert (code, out) == (2, "")
    assert "test_accuracy is 0.95, but its predictions give 0.9" in err
