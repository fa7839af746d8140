"""The recipes for accuracy: each trains, on the sample; what they promise of size and layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmbench.config import REPOSITORY, difference, to_json
from fmbench.entries import from_arguments, resolve
from fmbench.models import split_model
from fmbench.pages import speedrun
from fmbench.training import parallel
from fmbench.training.optimizer import make_optimizer
from fmbench.training.run import train_and_evaluate
from fmbench.training.steps import TrainState, count, make_model, train_step

# Deep and wide nets by a smaller one of the same class.
SMALLER = {
    "wide_resnet": {"model__depth": 10, "model__width": 1},
    "preact_resnet": {"model__depth": 8, "model__width": 1},
    "shake_shake": {"model__depth": 8, "model__width": 4},
    "resnet": {"model__depth": 8},
}
FOR_ACCELERATORS = ("wide_resnet", "preact_resnet", "shake_shake")
RECIPES = [
    "configs/resnet.py:20",
    "configs/wide_resnet.py:28-10",
    "configs/wide_resnet.py:40-4",
    "configs/preact_resnet.py:20-4",
    "configs/shake_shake.py:26-2x96d",
    "configs/tiny.py:20k",
    "configs/mlp.py:best",
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", RECIPES)
def test_recipe_trains(make_config, tmp_path, spec):
    name = make_config(spec).model.name
    config = make_config(spec, num_epochs=1, schedule__warmup_epochs=0.5, batch_size=96, **SMALLER.get(name, {}))
    record = train_and_evaluate(config, tmp_path / "work", results_dir=tmp_path / "results")
    assert (record.status, record.model, record.num_train) == ("completed", name, 480)
    assert record.dtype == ("bfloat16" if name in FOR_ACCELERATORS else "float32")


@pytest.mark.full
@pytest.mark.parametrize(
    "spec",
    [
        "configs/resnet.py:18",
        "configs/wide_resnet.py:16-4",
        "configs/wide_resnet.py:28-10",
        "configs/wide_resnet.py:40-4",
        "configs/preact_resnet.py:20-4",
        "configs/shake_shake.py:26-2x96d",
        "configs/tiny.py:100k",
        "configs/tiny.py:50k",
    ],
)
def test_nets_of_full_size_train(run_main, tmp_path, spec):
    """One update, on 16 images of the sample; the others validate."""
    done = run_main(
        f"--config={spec}",
        "--config.data.source=sample",
        "--config.data.split=train_test_split",
        "--config.data.test_size=0.96",
        "--config.num_epochs=1",
        "--config.batch_size=16",
        "--config.eval_batch_size=100",
        "--config.dtype=float32",  # several times as fast on CPUs
        "--config.schedule.warmup_epochs=0",
        f"--workdir={tmp_path}/work",
        f"--results_dir={tmp_path}/results",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "record.json").exists()


@pytest.mark.parametrize(("limit", "number"), [("100k", 100_000), ("50k", 50_000), ("20k", 20_000)])
def test_tiny_nets_use_their_limit_up(make_config, limit, number):
    _, params, model_state = split_model(model_of(make_config(f"configs/tiny.py:{limit}")))
    assert 0.98 * number < count(params) + count(model_state) < number


def test_the_best_net_of_dense_layers_has_no_others(make_config):
    _, params, _ = split_model(model_of(make_config("configs/mlp.py:best")))
    assert {leaf.ndim for leaf in jax.tree.leaves(params)} == {1, 2}


def test_the_argument_is_the_net(make_config):
    config = make_config("configs/wide_resnet.py:28-10")
    assert (config.model.depth, config.model.width) == (28, 10)
    config = make_config("configs/shake_shake.py:26-2x96d")
    assert (config.model.depth, config.model.width, config.num_epochs) == (26, 96, 400)
    config = make_config("configs/preact_resnet.py:20-4")
    assert (config.model.depth, config.model.width, config.num_epochs) == (20, 4, 200)
    assert make_config("configs/resnet.py:18").model.name == "resnet18"
    assert make_config("configs/resnet.py:56").model.depth == 56


def test_the_speed_record_for_accelerators_is_the_shaken_net():
    config, shaken = (
        from_arguments([f"--config={REPOSITORY}/configs/{spec}"])
        for spec in ("speedrun.py:96", "shake_shake.py:26-2x96d")
    )
    assert difference(to_json(config), to_json(shaken)) == (
        "config_file: configs/speedrun.py -> configs/shake_shake.py, entry: speedrun-96 -> shake_shake-26-2x96d"
    )


@pytest.mark.slow
def test_the_predicted_cost_of_the_speed_record_for_accelerators():
    """From the FLOPs of a step, as XLA counts them, which compiles and computes nothing."""
    config = resolve("speedrun:96", {})
    steps_per_epoch = 60_000 // config.batch_size
    tx, _ = make_optimizer(config, steps_per_epoch)
    graphdef, params, model_state = split_model(model_of(config, parallel.AXIS))
    state = TrainState(jnp.int32(0), params, model_state, nnx.eval_shape(tx.init, params), (params, model_state))
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        tx=tx,
        batch_size=config.batch_size,
        num_examples=config.batch_size,
        normalization=config.data.normalization,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        augment=config.augment.to_dict(),
    )
    rows = {"image": np.zeros((60_000, 784), np.uint8), "label": np.zeros(60_000, np.uint8)}
    order = np.zeros(steps_per_epoch * config.batch_size, np.int32)
    mapped = jax.jit(parallel.map_over(parallel.make_mesh(jax.devices()[:1]), step))
    lowered = mapped.trace(state, rows, order, np.uint32(0)).lower(lowering_platforms=("tpu",))
    flops = lowered.cost_analysis()["flops"] * steps_per_epoch * config.num_epochs
    assert round(flops / 1e15) == speedrun.PREDICTED_PFLOP_96


@pytest.mark.parametrize(
    "spec", ["tiny.py", "tiny.py:10k", "wide_resnet.py", "wide_resnet.py:28", "mlp.py:worst", "speedrun.py:97"]
)
def test_unknown_arguments_are_refused(make_config, spec):
    with pytest.raises(Exception, match=r"there (are|is) (100k|16-4|best|93, 94, 95, 94-gpu, 96)"):
        make_config(f"configs/{spec}")


def model_of(config, axis_name: str | None = None) -> nnx.Module:
    return nnx.eval_shape(lambda: make_model(config, axis_name, 0))
