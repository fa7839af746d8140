"""Exported models: what comes back is what was exported, or nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from damage import DAMAGE, cases
from flax import nnx
from orbax.checkpoint import v1 as ocp

from fmbench.errors import UserError
from fmbench.models import MODELS, exported, split_model
from fmbench.system import sealed

DESCRIPTION: dict[str, Any] = {
    "model": {"name": "cnn1"},
    "dtype": "float32",
    "normalization": "unit",
    "class_names": list("abcdefghij"),
    "entry": "cnn1",
    "seed": 0,
    "features": {"backbone": "", "weights": "", "image_size": 112, "preprocessing": "imagenet"},
    "test_accuracy": 0.9,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """With an exported model; tests work on copies."""
    workdir = tmp_path_factory.mktemp("workdir")
    params, model_state = split_model(MODELS["cnn1"](rngs=nnx.Rngs(0)))[1:]
    exported.export_model(workdir / "model", params, model_state, DESCRIPTION)
    return workdir


@pytest.fixture
def copied(workdir, tmp_path) -> Path:
    return Path(shutil.copytree(workdir / "model", tmp_path / "model"))


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        exported.load_model(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(directory: Path, change) -> None:
    """Changes model.json, and seals the folder anew as somebody who means harm would."""
    path = directory / "model.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    sealed.seal(directory)


def test_what_was_exported_comes_back(workdir):
    model, description = exported.load_model(workdir)
    expected = MODELS["cnn1"](rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, split_model(model)[1:], split_model(expected)[1:])
    assert {key: description[key] for key in DESCRIPTION} == DESCRIPTION


def test_an_export_replaces_the_one_before(copied):
    params, model_state = split_model(MODELS["cnn1"](rngs=nnx.Rngs(1)))[1:]
    exported.export_model(copied, params, model_state, DESCRIPTION)
    back = split_model(exported.load_model(copied)[0])[1]
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert [path.name for path in copied.parent.iterdir()] == ["model"]


def test_a_temperature_is_added_and_nothing_else_changes(copied):
    exported.add_temperature(copied, 0.7)
    model, description = exported.load_model(copied)
    assert (
        description
        == exported.check_export(copied)
        == {**exported.check_export(copied), **DESCRIPTION}
        | {
            "temperature": 0.7,
            "sha256": description["sha256"],
        }
    )
    expected = MODELS["cnn1"](rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, split_model(model)[1:], split_model(expected)[1:])
    assert [path.name for path in copied.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("all_of_it", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damage_of_any_file_is_refused(workdir, tmp_path, all_of_it):
    tried = 0
    for name, mode in cases(workdir / "model"):
        if (name, mode) == ("fmbench.json", "extend"):
            continue  # a newline behind JSON is none
        if not (all_of_it or mode == "flip" or name == "model.json"):
            continue
        directory = Path(shutil.copytree(workdir / "model", tmp_path / str(tried)))
        DAMAGE[mode](directory / name)
        said = refusal(directory)
        assert f"{name}: " in said or "holds no exported model" in said, (name, mode)
        tried += 1
    assert tried > (80 if all_of_it else 15)


def without(key):
    return lambda description: description.pop(key)


def having(key, value):
    return lambda description: description.update({key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((without(key), f"model.json: field '{key}': Field required") for key in list(DESCRIPTION)[:4]),
        (without("sha256"), "field 'sha256': Field required"),
        (having("more", 1), "field 'more': Extra inputs are not permitted"),
        (having("model", "cnn1"), "field 'model': "),
        (having("model", {}), "field 'model.name': Field required"),
        (having("model", {"name": 1}), "field 'model.name': "),
        (having("model", {"name": "lenet"}), "cannot be rebuilt here: config.model.name is 'lenet'"),
        (having("model", {"name": "cnn1", "depth": 3}), "cannot be rebuilt here: model 'cnn1' cannot be built"),
        (having("model", {"name": "mlp"}), "arrays: "),
        (having("model", {"name": "mlp", "hidden": [1 << 40, 1 << 40]}), "rebuilt here"),
        (having("dtype", "complex64"), "field 'dtype': "),
        (having("dtype", None), "field 'dtype': "),
        (having("normalization", "log"), "field 'normalization': "),
        (having("class_names", "abcdefghij"), "field 'class_names': "),
        (having("class_names", list("abc")), "field 'class_names': "),
        (having("class_names", [1] * 10), "field 'class_names.0': "),
        (having("seed", "0"), "field 'seed': "),
        (having("test_accuracy", float("nan")), "field 'test_accuracy': "),
        (having("test_accuracy", 1e300), "field 'test_accuracy': "),
        (having("temperature", 0.0), "field 'temperature': "),
        (having("features", {"backbone": "vgg20"}), "field 'features.backbone': "),
        (having("sha256", "0" * 64), "arrays: they are not those that were saved"),
    ],
)
def test_each_field_of_model_json_is_checked(copied, change, said):
    rewrite(copied, change)
    assert said in refusal(copied)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "model.json: is no JSON"),
        (b"\xff\xfe", "model.json: is not UTF-8"),
        (b"[]", "model.json: holds no JSON object"),
        (b"[" * 100_000, "model.json: is no JSON of ours: too deep"),
    ],
)
def test_what_is_no_description_is_named(copied, content, said):
    (copied / "model.json").write_bytes(content)
    sealed.seal(copied)
    assert said in refusal(copied)


def test_more_than_the_memory_is_refused_before_it_is_taken(copied, monkeypatch):
    rewrite(copied, having("model", {"name": "transfer_head", "num_features": 1 << 44}))
    monkeypatch.setattr(ocp, "load", lambda *arguments: pytest.fail("loaded"))
    assert "field 'model': " in (said := refusal(copied))
    assert "bytes of parameters, more than the memory" in said


def test_arrays_that_load_but_are_others_are_refused(copied):
    shutil.rmtree(copied / "arrays")
    params, model_state = split_model(MODELS["cnn1"](rngs=nnx.Rngs(1)))[1:]
    ocp.save(copied / "arrays", {"params": params, "model_state": model_state})
    sealed.seal(copied)
    assert "arrays: they are not those that were saved" in refusal(copied)
