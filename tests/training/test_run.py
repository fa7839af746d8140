"""The run from within: early stopping, the clock, the watched split."""

import pytest

from fmbench import config as config_lib
from fmbench.records import schema
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


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(make_config, tmp_path):
    config = make_config("configs/cnn1.py", batch_size=40, num_epochs=2, dtype="bfloat16", data__split="all")
    record = run(config, tmp_path)
    assert record.name.endswith(f"-cpu-{record.environment.machine_slug}-x8-bfloat16-seed0")
    assert record.test_accuracy is not None
    assert record.test_accuracy > 0.3  # it learns: chance is 0.1


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
