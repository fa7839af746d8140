"""fmbench from Python, on the sample: the examples of its docstrings, and what is said of mistakes."""

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fmbench
from fmbench import api, entries
from fmbench.data import fashion_mnist
from fmbench.models import build_model, split_model
from fmbench.records.schema import RunRecord
from fmbench.training import inference

QUICK: dict[str, Any] = {"data.source": "sample", "batch_size": 80, "num_epochs": 2}
WORKDIR = "workdirs/mlp-cpu-float32-seed0"


def example(function) -> str:
    """The indented lines of a docstring, before its sections."""
    text = inspect.getdoc(function)
    assert text
    before = re.split(r"^(?:Args|Returns|Raises):", text, flags=re.MULTILINE)[0]
    lines = [line for line in before.splitlines() if line.startswith("    ")]
    return textwrap.dedent("\n".join(lines))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of mlp."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        record = fmbench.train("mlp", workdir=WORKDIR, results_dir="results", **QUICK)
    return folder, record


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    return trained[1]


def test_all_that_is_public_is_there():
    assert sorted(fmbench.__all__) == fmbench.__all__
    assert all(hasattr(fmbench, name) for name in fmbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fmbench.trian


def test_train_returns_the_record_that_it_wrote(here):
    assert isinstance(here, RunRecord)
    assert here.entry == "mlp+batch_size=80+data.source=sample+num_epochs=2"
    assert (here.status, here.num_epochs) == ("completed", 2)
    assert fmbench.read_records("results") == [here] == fmbench.read_records()


def test_the_default_work_directory_has_the_records_name(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []

    def train_seeds(*arguments, **settings):
        seen.append((arguments, settings))
        return [here]

    monkeypatch.setattr(api, "train_seeds", train_seeds)
    fmbench.train("mlp", results_dir="elsewhere", force=True, **QUICK)
    ((config, seeds, workdir), settings) = seen.pop()
    assert (seeds, str(workdir)) == ((0,), f"workdirs/{config.entry}-cpu-x8-float32-seed0")
    assert (str(settings["results_dir"]), settings["force"]) == ("elsewhere", True)


def test_the_examples_of_the_docstrings_run(here, monkeypatch):
    images = fashion_mnist.load("sample").test_images
    monkeypatch.setattr(api, "train_seeds", lambda *a, **k: [here])
    ran = []
    for function in (fmbench, fmbench.train, fmbench.read_records, fmbench.load_model):
        code = example(function)
        assert "fmbench." in code
        names: dict[str, Any] = {"fmbench": fmbench, "images": images}
        exec(code, names)
        ran.append(names)
    assert ran[2]["best"] == here
    assert ran[3]["probabilities"].shape == (len(images), 10)


def test_a_loaded_model_is_a_function_with_the_predictions_of_its_run(here):
    dataset = fashion_mnist.load("sample")
    model = fmbench.load_model(WORKDIR)
    probabilities = model(dataset.test_images)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (200, 10))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == dataset.test_labels).mean() == here.test_accuracy
    assert (model.class_names[0], model.entry) == ("T-shirt/top", here.entry)
    assert model(dataset.test_images[:0]).shape == (0, 10)
    np.testing.assert_allclose(model(dataset.test_images[:1]), probabilities[:1], atol=1e-5)


@pytest.mark.parametrize(
    "images", [np.zeros((28, 28), np.uint8), np.zeros((2, 28, 28)), np.zeros((2, 784), np.uint8), [[1]]]
)
def test_other_images_are_refused(here, images):
    with pytest.raises(fmbench.UserError, match=r"they must be uint8 \(n, 28, 28\)"):
        fmbench.load_model(WORKDIR)(images)


def test_what_is_listed_can_be_trained():
    assert {"mlp", "cnn4", "resnet", "transfer_head"} <= set(fmbench.list_models())
    assert {"mlp", "mlp:best", "speedrun:94"} <= set(fmbench.list_configs())


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        ("mpl", {}, "no config 'mpl'; the nearest is mlp."),
        ("", {}, "--config is missing"),
        ("mlp", {"num_epoch": 2}, "config has no field 'num_epoch'; the nearest are num_epochs"),
        ("mlp", {"num_epochs": "two"}, "config.num_epochs is 'two'; it must be a whole number."),
        ("mlp", {"num_epochs": 0}, "config.num_epochs is 0; it must be at least 1."),
    ],
)
def test_mistakes_are_user_errors_before_anything_is_written(
    tmp_path, monkeypatch, config: str, overrides: dict[str, Any], said: str
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fmbench.UserError) as error:
        fmbench.train(config, **overrides)
    assert str(error.value).startswith(said)
    assert not list(tmp_path.iterdir())


def test_no_entry_is_without_a_name(tmp_path):
    for overrides in (dict[str, Any](), dict[str, Any](entry="x")):
        with pytest.raises(fmbench.UserError, match="config file"):
            fmbench.train(str(_copy(tmp_path / ".py")), **overrides)


def _copy(path):
    path.write_text("from fmbench.config import base_config as get_config\n")
    return path


def test_a_record_without_an_entry_is_not_valid(here):
    fields = here.model_dump()
    fields["config"] = fields["config"] | {"entry": ""}
    with pytest.raises(ValueError, match="should match pattern"):
        RunRecord.model_validate(fields | {"entry": ""})


def test_an_interrupted_run_is_an_interrupt(here, monkeypatch):
    stopped = here.model_copy(update={"status": "interrupted"})
    monkeypatch.setattr(api, "train_seeds", lambda *a, **k: [stopped])
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        fmbench.train("mlp", workdir="elsewhere", **QUICK)


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(fmbench.UserError, match="holds no records"):
        fmbench.read_records(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "git_dirty", "folder"),
    [({}, False, "results"), ({}, None, "results"), ({}, True, "trials"), ({"num_epochs": 2}, False, "trials")],
)
def test_what_was_changed_does_not_go_where_records_are_kept(monkeypatch, overrides, git_dirty, folder):
    environment = api.machine.environment(ask_driver=False).model_copy(update={"git_dirty": git_dirty})
    monkeypatch.setattr(api.machine, "environment", lambda ask_driver: environment)
    assert api.default_results_dir(entries.resolve("mlp", overrides)) == Path(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_classifier_that_is_made_once_says_what_classify_says(dtype):
    model: Any = build_model({"name": "cnn4"}, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    description = {"normalization": "standard", "temperature": 1.5}
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    classifier = inference.make_classifier(model, description)
    # In bfloat16 XLA may leave out conversions that are in one program.
    atol = 0 if dtype == "float32" else 1e-3
    np.testing.assert_allclose(
        classifier(images), inference.classify(model, description, images), rtol=0, atol=atol
    )
    assert model.conv1.kernel[...].dtype == jnp.float32  # who was given it keeps it as it was
    graphdef, *states = split_model(model)
    params, model_state = inference.in_dtype_of_computation(graphdef, *states)
    assert params["conv1"]["kernel"].dtype == params["head"]["bias"].dtype == jnp.dtype(dtype)
    assert params["norm1"]["scale"].dtype == model_state["norm1"]["var"].dtype == jnp.float32
