"""The run from within: early stopping, the clock, the watched split."""

import argparse
import dataclasses
import itertools
import json
import time
from typing import Any

import numpy as np
import pytest

from fmbench import config as config_lib
from fmbench.data import fashion_mnist
from fmbench.models import confidence, exported
from fmbench.records import calibration, schema
from fmbench.system import load
from fmbench.system.timing import Lap
from fmbench.training import inference, input_pipeline
from fmbench.training import run as training_run
from fmbench.training.record import Diary, time_to_target
from fmbench.training.run import train_and_evaluate


def run(config, path):
    return train_and_evaluate(config, path / "work", results_dir=path / "results")


def test_early_stopping_waits_its_patience_and_reports_the_last_epoch(make_config, tmp_path):
    # With a learning rate of zero the first epoch stays the best for ever.
    config = make_config(
        "configs/mlp.py",
        batch_size=40,
        num_epochs=9,
        watch="validation",
        data__split="default",
        optimizer__learning_rate=0.0,
        early_stopping_patience=2,
    )
    record = run(config, tmp_path)
    assert (record.status, record.num_epochs) == ("completed", 3)
    assert len({epoch.val_accuracy for epoch in record.history}) == 1


@pytest.mark.parametrize(
    ("watch", "split", "watched"),
    [("test", "all", "test"), ("validation", "all", None), ("none", "default", None)],
)
def test_only_the_watched_split_is_evaluated_in_each_epoch(make_config, tmp_path, watch, split, watched):
    config = make_config("configs/mlp.py", batch_size=240, num_epochs=2, watch=watch, data__split=split)
    record = run(config, tmp_path)
    assert record.watched == watched
    assert [epoch.test_accuracy is not None for epoch in record.history] == [watched == "test"] * 2
    assert all(epoch.val_accuracy is None for epoch in record.history)
    assert (record.val_accuracy is not None) == (split == "default")
    if watched == "test":
        assert record.history[-1].test_accuracy == record.test_accuracy


def test_another_seed_is_another_run(make_config, tmp_path):
    configs = [make_config("configs/mlp.py", batch_size=240, num_epochs=1, seed=seed) for seed in (0, 1)]
    first, second = (run(config, tmp_path / str(config.seed)) for config in configs)
    assert (first.name[:-1], first.name[-1], second.name[-1]) == (second.name[:-1], "0", "1")
    assert first.history[0].train_loss != second.history[0].train_loss


def test_epochs_that_keep_their_remainder_see_every_image_in_steps_of_two_sizes(make_config, tmp_path):
    settings = {"batch_size": 56, "num_epochs": 2, "data__remainder": "keep"}
    records = {
        steps_per_call: run(
            make_config("configs/mlp.py", steps_per_call=steps_per_call, **settings),
            tmp_path / str(steps_per_call),
        )
        for steps_per_call in (1, 3)
    }
    for record in records.values():
        assert [epoch.step for epoch in record.history] == [9, 18]
        for epoch in record.history:
            assert epoch.train_images_per_sec * epoch.train_seconds == pytest.approx(480)
    losses = [[epoch.train_loss for epoch in record.history] for record in records.values()]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(make_config, tmp_path):
    config = make_config("configs/cnn1.py", batch_size=40, num_epochs=2, dtype="bfloat16", data__split="all")
    record = run(config, tmp_path)
    assert record.name.endswith(f"-cpu-{record.environment.machine_slug}-x8-bfloat16-seed0")
    assert record.test_accuracy is not None
    assert record.test_accuracy > 0.3  # it learns: chance is 0.1


def test_the_load_is_noted_with_every_epoch(make_config, tmp_path, monkeypatch):
    readings = itertools.count(1)
    monkeypatch.setattr(load, "read", lambda: load.Reading(n := next(readings), 10.0 * n, 100.0 * n, 1000 * n))
    record = run(make_config("configs/mlp.py", batch_size=240, num_epochs=2), tmp_path)
    for epoch in record.history:
        # One lap in each epoch, whose readings are successive ones.
        assert epoch.load_average is not None
        assert epoch.load_average % 1 == pytest.approx(0.5)
        noted = epoch.other_core_seconds, epoch.stolen_core_seconds, epoch.involuntary_switches
        assert noted == (10, 100, 1000)


def test_an_interrupted_epochs_load_is_that_of_its_parts():
    diary = Diary()
    metrics = {"loss": np.ones(1), "accuracy": np.ones(1)}
    diary.add_steps(metrics, Lap(1.0, 2.0, 0.0, load.Load(4.0, 1.0, None, 5)))
    diary = Diary(**json.loads(json.dumps(diary.to_json())))
    diary.add_steps(metrics, Lap(3.0, 2.0, 0.0, load.Load(8.0, 2.0, None, 6)))
    data: Any = argparse.Namespace(steps_per_epoch=2, images_per_epoch=2, watched=None)
    epoch = diary.end_epoch(data, 2, 0.1, {})
    assert (epoch["load_average"], epoch["other_core_seconds"], epoch["involuntary_switches"]) == (7.0, 3.0, 11)
    assert "stolen_core_seconds" not in epoch  # nobody told


def test_a_completed_record_says_what_the_machine_reaches_and_no_clock_runs_meanwhile(
    make_config, tmp_path, monkeypatch
):
    measured = calibration.Calibration({"float32": 1.0, "bfloat16": 2.0}, 3.0)
    sample = fashion_mnist.load("sample")
    config = make_config("configs/mlp.py", batch_size=240, num_epochs=1)
    assert run(config, tmp_path / "sample").calibration is None
    monkeypatch.setattr(fashion_mnist, "load", lambda *_: dataclasses.replace(sample, version="2017-08-31"))

    def slowly():
        time.sleep(1)
        return measured

    monkeypatch.setattr(calibration, "measure_beside_a_run", slowly)
    began = time.perf_counter()
    record = run(config, tmp_path)
    took = time.perf_counter() - began
    assert record.calibration == schema.Calibration(**measured._asdict())
    assert record.wall_seconds < took - 1
    monkeypatch.setattr(calibration, "measure_beside_a_run", lambda: None)  # too little memory
    assert run(config, tmp_path / "other").calibration is None


def test_probabilities_are_calibrated_on_validation_while_no_clock_runs(make_config, tmp_path, monkeypatch):
    measure = inference.measure_confidence

    def slowly(*arguments):
        time.sleep(2)
        return measure(*arguments)

    monkeypatch.setattr(inference, "measure_confidence", slowly)
    began = time.perf_counter()
    record = run(make_config("configs/mlp.py", batch_size=40, num_epochs=1, data__split="default"), tmp_path / "a")
    assert record.wall_seconds < time.perf_counter() - began - 2
    found = record.confidence
    assert found is not None and found.temperature is not None
    model, description = exported.load_model(tmp_path / "a" / "work")
    assert description["temperature"] == found.temperature != 1
    dataset = fashion_mnist.load("sample")
    labels, logits = dataset.test_labels, inference.logits(model, description, dataset.test_images)
    probabilities = inference.classify(model, description, dataset.test_images)
    np.testing.assert_allclose(probabilities, confidence.probabilities(logits, found.temperature))
    after = confidence.bins(probabilities, labels).calibration_error
    before = confidence.bins(confidence.probabilities(logits), labels).calibration_error
    assert found.calibration_error_at_temperature == pytest.approx(after, abs=1e-4)
    assert found.calibration_error == pytest.approx(before, abs=1e-4)
    assert record.test_accuracy == (probabilities.argmax(axis=1) == labels).mean()

    record = run(make_config("configs/mlp.py", batch_size=240, num_epochs=1, data__split="all"), tmp_path / "b")
    assert record.confidence is not None and record.confidence.calibration_error > 0
    assert record.confidence.temperature is record.confidence.calibration_error_at_temperature is None
    assert "temperature" not in exported.load_model(tmp_path / "b" / "work")[1]


def test_nothing_compiles_while_training_is_timed(make_config, tmp_path, monkeypatch):
    config = make_config("configs/mlp.py", batch_size=240, num_epochs=3, selection__easy=0.3)
    orders: tuple[Any, ...] = (input_pipeline._epoch_order, input_pipeline._hard_epoch_order)
    compiled = []
    train_epoch = training_run._train_epoch

    def noting(*arguments):
        compiled.append([order._cache_size() for order in orders])
        trained = train_epoch(*arguments)
        compiled.append([order._cache_size() for order in orders])
        return trained

    for order in orders:
        order.clear_cache()
    monkeypatch.setattr(training_run, "_train_epoch", noting)
    run(config, tmp_path)
    assert compiled == [[1, 1]] * 6


@pytest.mark.slow
def test_each_stage_trains_with_its_own_augmentation(make_config, tmp_path):
    def losses(name, cutout):
        config = make_config("configs/baseline.py", batch_size=40, num_epochs=2)
        with config.unlocked():
            for stage in ("stage1", "stage2"):
                config.stages[stage] = config_lib.stage(num_epochs=1)
            config.stages.stage2.augment.cutout = cutout
        return [epoch.train_loss for epoch in run(config, tmp_path / name).history]

    plain, augmented = losses("plain", 0), losses("augmented", 20)
    assert augmented[0] == plain[0]
    assert augmented[1] > plain[1]  # with most of every image gone


def epochs(accuracies, watched="val"):
    return [
        schema.Epoch(
            epoch=i + 1, step=i + 1, learning_rate=0.1, train_loss=1.0, train_accuracy=0.5, train_seconds=2.0,
            train_core_seconds=3.0, train_images_per_sec=1.0, **{f"{watched}_accuracy": accuracy},
        )
        for i, accuracy in enumerate(accuracies)
    ]  # fmt: skip


@pytest.mark.parametrize(("watched", "prefix"), [("validation", "val"), ("test", "test")])
def test_time_to_target_is_training_time_to_the_first_epoch_that_reaches_it(watched, prefix):
    history = epochs([0.89, 0.9, 0.93, 0.91, 0.9399], prefix)
    assert time_to_target(history, watched) == {"90": 4.0, "92": 6.0, "94": None}


def test_time_to_target_without_a_watched_split_is_always_a_miss():
    assert set(time_to_target(epochs([None]), None).values()) == {None}


def test_patience_counts_from_the_best_epoch():
    accuracies = [0.5, 0.7, 0.7, 0.6]
    diaries = [Diary([{"val_accuracy": a} for a in accuracies[:n]]) for n in range(5)]
    assert [diary.is_stuck(patience=2) for diary in diaries] == [False, False, False, False, True]
    assert not any(diary.is_stuck(patience=0) for diary in diaries)
