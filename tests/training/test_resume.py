"""Runs that are stopped and killed: real processes, real signals, real checkpoints, the same bits at the end."""

import json
import signal
import time

import jax
import numpy as np
import pytest

from fmbench.models import exported, split_model
from fmbench.records import store
from fmbench.system.load import Load

# Dropout, batch norm, averaged weights, examples chosen by their losses, two stages; some 15 ms a step, 55 steps
# an epoch.
RUN = (
    "--config=configs/cnn4.py",
    "--config.data.source=sample",
    "--config.data.split=default",
    "--config.batch_size=8",
    "--config.num_epochs=4",
    "--config.stages.stage1.num_epochs=2",
    "--config.ema_decay=0.9",
    "--config.selection.easy=0.4",
    "--config.selection.after_epochs=1",
)
ENTRY = (
    "cnn4+batch_size=8+data.source=sample+data.split=default+ema_decay=0.9+num_epochs=4"
    "+selection.after_epochs=1+selection.easy=0.4+stages.stage1.num_epochs=2"
)


def places(path):
    return f"--workdir={path / 'work'}", f"--results_dir={path / 'results'}"


def published(path):
    """The record that the run left in its results, under the name of this machine."""
    (record,) = (path / "results" / "runs").glob(f"{ENTRY}-cpu-*-float32-seed0.json")
    return record


def outcome(path):
    """What must not depend on interruptions: parameters, predictions, and the history but for times and load."""
    model, _ = exported.load_model(path / "work")
    record = store.read(path / "work" / "record.json")
    history = [
        {
            name: value
            for name, value in epoch.model_dump(exclude_none=True).items()
            if "seconds" not in name and "per_sec" not in name and name not in Load._fields
        }
        for epoch in record.history
    ]
    stages = [(stage.name, stage.num_epochs, stage.test_accuracy, stage.val_accuracy) for stage in record.stages]
    params = jax.tree.leaves(split_model(model)[1:])
    return params, np.load(path / "work" / "record.npy"), stages, history, record


def steps_in_metrics(path):
    lines = (path / "work" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="session")
def undisturbed(run_main, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    done = run_main(*RUN, *places(path))
    assert done.returncode == 0, done.stderr
    return path


def test_a_run_leaves_a_completed_record_and_predictions(undisturbed):
    record = store.read(published(undisturbed))
    assert record.status == "completed"
    assert (record.num_params, record.num_trainable_params) == (1_221_546, 1_219_754)
    assert (record.num_train, record.num_validation, record.num_test) == (440, 40, 200)
    assert (record.num_epochs, record.num_steps, record.num_resumes) == (4, 220, 0)
    assert record.watched == "validation"
    assert record.history[-1].val_accuracy == record.val_accuracy
    assert 0 < record.train_seconds < record.wall_seconds
    plain, augmented = record.stages
    assert (plain.name, plain.num_epochs, plain.augment["rotation"]) == ("stage1", 2, 0)
    assert (augmented.name, augmented.num_epochs, augmented.augment["rotation"]) == ("stage2", 2, 8)
    assert plain.val_accuracy == record.history[1].val_accuracy
    assert (augmented.val_accuracy, augmented.test_accuracy) == (record.val_accuracy, record.test_accuracy)
    assert plain.train_seconds + augmented.train_seconds == pytest.approx(record.train_seconds)
    assert record.flops_per_image > 2 * 3 * 2.1e6  # its multiplications, forward and backward
    predictions = store.read_predictions(record, published(undisturbed).with_suffix(".npy"))
    assert predictions.shape == (200,)


@pytest.mark.parametrize(
    ("sent", "epochs"),
    [
        (signal.SIGKILL, 1),
        *(
            pytest.param(sent, epochs, marks=pytest.mark.slow)
            for sent, epochs in [(signal.SIGKILL, 2), (signal.SIGINT, 3), (signal.SIGTERM, 2)]
        ),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(undisturbed, start_main, run_main, tmp_path, sent, epochs):
    process = start_main(*RUN, *places(tmp_path))
    saved = tmp_path / "work" / "checkpoints" / str(55 * epochs)
    while process.poll() is None and not saved.exists():
        time.sleep(0.01)
    time.sleep(0.2)  # into the next epoch
    process.send_signal(sent)
    process.communicate(timeout=60)
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        stopped = store.read(published(tmp_path))
        assert stopped.status == "interrupted"
        assert stopped.num_epochs >= epochs
        assert stopped.num_steps < 220

    done = run_main(*RUN, *places(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    *got, record = outcome(tmp_path)
    *expected, _ = outcome(undisturbed)
    assert record.num_resumes == 1
    first, second = record.processes
    assert first.ended == ("killed" if sent == signal.SIGKILL else "interrupted")
    assert (first.first_step, second.last_step, second.ended) == (0, 220, "completed")
    assert first.last_step == second.first_step >= 55 * epochs
    assert first.wall_seconds > 1 and record.wall_seconds == pytest.approx(
        first.wall_seconds + second.wall_seconds
    )
    jax.tree.map(np.testing.assert_array_equal, got[:2], expected[:2])
    assert got[2] == expected[2]
    for epoch, undisturbed_epoch in zip(got[3], expected[3], strict=True):
        assert epoch == pytest.approx(undisturbed_epoch, rel=1e-12)
    assert steps_in_metrics(tmp_path) == [55, 110, 165, 220]
