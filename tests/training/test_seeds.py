"""Several seeds in one program: each learns what it would learn alone, and leaves a record of its own."""

import dataclasses
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmbench.errors import UserError
from fmbench.models import exported, split_model
from fmbench.records import store
from fmbench.training import input_pipeline, parallel, steps
from fmbench.training.optimizer import make_optimizer
from fmbench.training.run import train_and_evaluate, train_seeds

SEEDS = (3, 0, 7)


def prepare(config, num_devices, seeds):
    """Data, a function that makes the state of seeds, and one that compiles the programs."""
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    data = input_pipeline.load(config, mesh, seeds)
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    graphdef, state = steps.init_state(config, tx, mesh, data.seed, len(data.train_rows["label"]))
    return data, state, lambda length: steps.compile_programs(config, mesh, data, graphdef, tx, state, length)


def train(data, state, program):
    """Two calls, each with the order of another epoch."""
    for epoch in range(2):
        order = data.epoch_order(epoch, state.losses and state.losses["last"])
        state, metrics = program.run(state, data.train_rows, order, data.seed)
    return state, metrics


# Dropout; averaged weights; batch norm, Muon, erasing, and examples chosen by their losses.
@pytest.mark.parametrize(
    ("spec", "changes", "num_devices", "mode", "steps_per_call"),
    [
        ("configs/mlp.py", {}, 1, "jit", 3),
        ("configs/mlp.py", {"ema_decay": 0.5}, 8, "pmap", 1),
        pytest.param(
            "configs/speedrun.py:95",
            {"model__stem_width": 4, "model__widths": (4, 8, 12), "selection__after_epochs": 1},
            *(8, "jit", 1),
            marks=pytest.mark.slow,
        ),
        pytest.param("configs/cnn4.py", {"optimizer__name": "sgd"}, 8, "jit", 1, marks=pytest.mark.slow),
    ],
)
def test_each_seed_takes_the_steps_it_takes_alone(make_config, spec, changes, num_devices, mode, steps_per_call):
    config = make_config(spec, batch_size=40, parallel=mode, **changes)
    data, state, compile_programs = prepare(config, num_devices, SEEDS)
    (programs, *_), eval_programs = compile_programs(steps_per_call)
    state, metrics = train(data, state, programs[steps_per_call])
    evaluations = steps.evaluate(eval_programs, state, data.eval_batches["test"])
    losses = np.reshape(metrics["loss"], (steps_per_call, len(SEEDS)))

    (programs, *_), eval_programs = prepare(config, num_devices, ())[-1](steps_per_call)
    assert len(evaluations) == len(SEEDS)
    for index, seed in enumerate(SEEDS):
        with config.unlocked():
            config.seed = seed
        data, alone, _ = prepare(config, num_devices, ())
        alone, metrics = train(data, alone, programs[steps_per_call])
        np.testing.assert_allclose(losses[:, index], np.atleast_1d(metrics["loss"]), rtol=1e-4)
        pairs = zip(*(jax.tree.leaves(one.evaluated) for one in (steps.of_seed(state, index), alone)), strict=True)
        for got, expected in pairs:
            # Where a gradient is noise, so is the direction in which Adam and Muon step.
            assert np.mean(np.abs(got - expected) > 1e-4 + 1e-3 * np.abs(expected)) < 0.01
        (expected,) = steps.evaluate(eval_programs, alone, data.eval_batches["test"])
        np.testing.assert_allclose(evaluations[index].loss, expected.loss, rtol=1e-3)
        assert np.mean(evaluations[index].predictions != expected.predictions) <= 0.01


def test_the_first_state_and_the_orders_are_bit_for_bit_those_of_the_seeds_alone(make_config):
    config = make_config("configs/mlp.py", batch_size=40)
    mesh = parallel.make_mesh(jax.devices()[:1])
    data = input_pipeline.load(config, mesh, SEEDS)
    tx, _ = make_optimizer(config, data.steps_per_epoch)
    _, state = steps.init_state(config, tx, mesh, data.seed)
    for index, seed in enumerate(SEEDS):
        with config.unlocked():
            config.seed = seed
        one = input_pipeline.load(config, mesh)
        jax.tree.map(
            np.testing.assert_array_equal,
            steps.of_seed(state, index),
            steps.init_state(config, tx, mesh, one.seed)[1],
        )
        np.testing.assert_array_equal(data.epoch_order(1)[index], one.epoch_order(1))


def test_each_seed_leaves_a_record_a_model_and_metrics(make_config, tmp_path):
    config = make_config("configs/mlp.py", batch_size=40, num_epochs=2)
    records = train_seeds(config, SEEDS, tmp_path / "work", results_dir=tmp_path / "results")
    published = store.read_all(tmp_path / "results")
    assert sorted(published.values(), key=lambda record: SEEDS.index(record.seed)) == records
    alone = train_and_evaluate(config, tmp_path / "alone", results_dir=tmp_path / "alone")
    assert (alone.trained_with, alone.seed) == (0, 0)
    for seed, record in zip(SEEDS, records, strict=True):
        assert record.name == f"{record.entry}-cpu-{record.environment.machine_slug}-x8-float32-seed{seed}-with2"
        assert (record.seed, record.config["seed"], record.trained_with) == (seed, seed, 2)
        assert record.num_params == alone.num_params
        assert record.flops_per_image == pytest.approx(alone.flops_per_image, rel=1e-5)
        assert (tmp_path / "work" / f"seed{seed}" / "model").is_dir()
        assert len((tmp_path / "work" / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()) == 2
        # The times are of all together.
        assert record.train_seconds == records[0].train_seconds
    same = records[SEEDS.index(0)]
    assert same.entry == alone.entry
    np.testing.assert_allclose(same.history[1].train_loss, alone.history[1].train_loss, rtol=1e-3)


def test_one_that_diverges_leaves_the_others_to_go_on(make_config, tmp_path, monkeypatch):
    init_state = steps.init_state

    def init_with_a_bad_one(*arguments):
        graphdef, state = init_state(*arguments)
        bad = jnp.array([1.0, jnp.nan, 1.0])
        params = jax.tree.map(lambda x: x * bad.reshape(-1, *[1] * (x.ndim - 1)), state.params)
        return graphdef, dataclasses.replace(state, params=params)

    monkeypatch.setattr(steps, "init_state", init_with_a_bad_one)
    config = make_config("configs/mlp.py", batch_size=40, num_epochs=2)
    records = train_seeds(config, SEEDS, tmp_path / "work", results_dir=tmp_path / "results")
    assert [record.status for record in records] == ["completed", "diverged", "completed"]
    assert [record.num_epochs for record in records] == [2, 0, 2]
    assert [record.test_accuracy is None for record in records] == [False, True, False]


def test_seeds_that_early_stopping_would_part_are_refused(make_config, tmp_path):
    config = make_config("configs/mlp.py", batch_size=40, early_stopping_patience=2, watch="validation")
    with pytest.raises(UserError, match="one by one"):
        train_seeds(config, SEEDS, tmp_path / "work", results_dir=tmp_path / "results")
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_killed_in_the_midst_they_go_on_to_the_same_bits(start_main, run_main, tmp_path):
    flags = (
        *("--config=mlp", "--config.data.source=sample", "--config.batch_size=40", "--config.num_epochs=40"),
        *("--config.steps_per_call=100", "--seeds=5,2"),  # an epoch a call
    )

    def places(path):
        return f"--workdir={path / 'work'}", f"--results_dir={path / 'results'}"

    def outcome(path):
        directories = [path / "work" / f"seed{seed}" for seed in (5, 2)]
        return [
            (split_model(exported.load_model(directory)[0])[1:], np.load(directory / "record.npy"))
            for directory in directories
        ]

    done = run_main(*flags, *places(tmp_path / "undisturbed"))
    assert done.returncode == 0, done.stderr
    process = start_main(*flags, *places(tmp_path))
    while process.poll() is None and not (tmp_path / "work" / "checkpoints" / "24").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    done = run_main(*flags, *places(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    jax.tree.map(np.testing.assert_array_equal, outcome(tmp_path), outcome(tmp_path / "undisturbed"))
    records = store.read_all(tmp_path / "results").values()
    assert sorted((record.seed, record.trained_with, record.num_resumes) for record in records) == [
        (2, 1, 1),
        (5, 1, 1),
    ]
