"""Models of somebody else's: what is said of one that is not built or called as ours, and that it comes back."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import outside
import pytest
from flax import nnx

from fmbench.errors import UserError
from fmbench.models import MODELS, build_model, check_model, exported, split_model
from fmbench.training import inference, steps


def line_of(name: str) -> str:
    lines = Path(outside.__file__).read_text().splitlines()
    return f"outside.py:{next(number for number, line in enumerate(lines, 1) if f'# line of {name}' in line)})"


def test_a_model_by_its_import_path_gets_the_arguments():
    model = nnx.eval_shape(lambda: build_model({"name": "outside:Little", "width": 5}, rngs=nnx.Rngs(0)))
    assert isinstance(model, outside.Little)
    assert model.hidden.kernel.shape == (784, 5)
    check_model({"name": "outside:Little", "width": 5})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": "outside:TakesNoAxisName"}, "its constructor does not take axis_name; it must take rngs"),
        ({"name": "outside:NeedsMore"}, "its constructor also needs depth"),
        ({"name": "outside:Little", "widht": 3}, "its constructor does not take widht"),
        ({"name": "tiny"}, "model 'tiny' cannot be built from config.model: its constructor also needs widths"),
        ({"name": "outside:FailsToBuild"}, line_of("FailsToBuild")),
        ({"name": "outside:TakesNoTrain"}, "its __call__ does not take train, rngs; it must be __call__("),
        ({"name": "outside:TakesNoImages"}, "its __call__ takes 1 arguments by their place, and is given 2"),
        ({"name": "outside:IsNotCalled"}, "its __call__ is missing"),
        ({"name": "outside:FailsInTraining"}, "fails in training on inputs (2, 28, 28, 1): TypeError: "),
        ({"name": "outside:FailsInTraining"}, line_of("FailsInTraining")),
        ({"name": "outside:ReturnsOneNumber"}, "returns float32 (2,) in evaluation"),
        ({"name": "outside:ReturnsClasses"}, "returns int32 (2, 10) in evaluation"),
        ({"name": "outside:ReturnsTwo"}, "returns a tuple in evaluation"),
        ({"name": "outside:momentum"}, "is no model: it must be a subclass of flax.nnx.Module"),
        ({"name": "outside:jnp"}, "is no model: it must be a subclass of flax.nnx.Module"),
        ({"name": "outside:Litle"}, "has no 'Litle'; the nearest is Little"),
        ({"name": "cnn9"}, "it must be one of "),
        ({"name": "vgg_lik"}, "the nearest is vgg_like"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(model, said):
    with pytest.raises(UserError) as error:
        check_model(model)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_of_ours_pass(dtype):
    for name, arguments in (("cnn4", {}), ("resnet", {"depth": 8}), ("transfer_head", {"num_features": 7})):
        check_model({"name": name, **arguments}, dtype, (7,) if name == "transfer_head" else (28, 28, 1))
        assert name in MODELS


def test_it_is_checked_before_a_state_is_made(make_config):
    with pytest.raises(UserError, match="returns a tuple"):
        steps.make_model(make_config("configs/mlp.py", model__name="outside:ReturnsTwo"), None, 0)


def export(directory: Path, name: str, **arguments) -> nnx.Module:
    model = outside.Little(rngs=nnx.Rngs(0), **arguments)
    _, params, model_state = split_model(model)
    description = {
        "model": {"name": name, **arguments},
        "dtype": "float32",
        "normalization": "unit",
        "class_names": list("abcdefghij"),
    }
    exported.export_model(directory, params, model_state, description)
    return model


def test_an_exported_one_comes_back(tmp_path):
    model = export(tmp_path / "model", "outside:Little", width=4)
    back, description = exported.load_model(tmp_path)
    assert isinstance(back, outside.Little)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    expected = model(images.reshape(3, 28, 28, 1) / np.float32(255))
    np.testing.assert_allclose(inference.logits(back, description, images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os:system", "is no model"),
        ("nowhere.at_all:Little", "there is no module 'nowhere'"),
        ("outside:NeedsMore", "also needs depth"),
    ],
)
def test_a_file_calls_nothing_but_models(tmp_path, monkeypatch, name, said):
    export(tmp_path / "model", name)
    monkeypatch.setattr(os, "system", lambda *arguments, **more: pytest.fail("called"))
    with pytest.raises(UserError) as error:
        exported.load_model(tmp_path)
    assert f"{tmp_path / 'model'} holds a model that cannot be rebuilt here: " in str(error.value)
    assert said in str(error.value)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["model"]["name"] == name


def test_features_without_a_layer_named_need_a_head():
    model = outside.Little(rngs=nnx.Rngs(0))
    images = np.zeros((2, 28, 28), np.uint8)
    assert inference.layer_features(model, images, "unit", "hidden").shape == (2, 8)
    with pytest.raises(UserError, match=r"--layer is missing.* the input of head: .*it has hidden, last\."):
        inference.layer_features(model, images, "unit", None)


def test_no_arrays_are_made_by_the_check():
    before = len(jax.live_arrays())
    check_model({"name": "outside:Little", "width": 4096})
    assert len(jax.live_arrays()) - before < 10
