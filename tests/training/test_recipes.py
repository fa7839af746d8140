"""The recipes for accuracy: each trains, on the sample; what they promise of size and layers."""

import jax
import pytest
from flax import nnx

from fmbench.config import REPOSITORY, difference, to_json
from fmbench.entries import from_arguments
from fmbench.models import split_model
from fmbench.training.run import train_and_evaluate
from fmbench.training.steps import count, make_model

# Deep and wide nets by a smaller one of the same class.
SMALLER = {"wide_resnet": {"model__depth": 10, "model__width": 1}, "resnet": {"model__depth": 8}}
RECIPES = [
    "configs/resnet.py:20",
    "configs/wide_resnet.py:28-10",
    "configs/wide_resnet.py:40-4",
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
    assert record.dtype == ("bfloat16" if name == "wide_resnet" else "float32")


@pytest.mark.full
@pytest.mark.parametrize(
    "spec",
    [
        "configs/resnet.py:18",
        "configs/wide_resnet.py:16-4",
        "configs/wide_resnet.py:28-10",
        "configs/wide_resnet.py:40-4",
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
    assert make_config("configs/resnet.py:18").model.name == "resnet18"
    assert make_config("configs/resnet.py:56").model.depth == 56


def test_the_speed_record_for_accelerators_is_the_wide_net():
    config, wide = (
        from_arguments([f"--config={REPOSITORY}/configs/{spec}"])
        for spec in ("speedrun.py:96", "wide_resnet.py:40-4")
    )
    assert difference(to_json(config), to_json(wide)) == (
        "config_file: configs/speedrun.py -> configs/wide_resnet.py, entry: speedrun-96 -> wide_resnet-40-4"
    )


@pytest.mark.parametrize(
    "spec", ["tiny.py", "tiny.py:10k", "wide_resnet.py", "wide_resnet.py:28", "mlp.py:worst", "speedrun.py:97"]
)
def test_unknown_arguments_are_refused(make_config, spec):
    with pytest.raises(Exception, match=r"there (are|is) (100k|16-4|best|93, 94, 95, 96)"):
        make_config(f"configs/{spec}")


def model_of(config) -> nnx.Module:
    return nnx.eval_shape(lambda: make_model(config, None, 0))
