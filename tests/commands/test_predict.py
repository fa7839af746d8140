"""Images in, labels out: from an exported model, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from matplotlib.container import BarContainer

from fmbench import predict
from fmbench.data import fashion_mnist
from fmbench.models import MODELS, exported, split_model
from fmbench.system import runtime
from fmbench.training import inference, parallel

REPOSITORY = Path(__file__).parents[2]
DESCRIPTION = {
    "entry": "cnn4",
    "model": {"name": "cnn4"},
    "dtype": "float32",
    "normalization": "symmetric",
    "class_names": fashion_mnist.CLASS_NAMES,
}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return fashion_mnist.load("sample").test_images[:4]


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    """A CNN with batch norm and arbitrary numbers in it."""
    graphdef, *shapes = split_model(nnx.eval_shape(lambda: MODELS["cnn4"](rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params, model_state = jax.tree.map(lambda x: jnp.asarray(rng.uniform(-0.1, 0.1, x.shape), x.dtype), shapes)
    return nnx.merge(graphdef, params, jax.tree.map(jnp.abs, model_state))  # variances are positive


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory) -> Path:
    """A work directory with the model, exported from two devices if there are as many."""
    workdir = tmp_path_factory.mktemp("workdir")
    mesh = parallel.make_mesh(jax.devices()[:2])
    params, model_state = parallel.replicate(split_model(model)[1:], mesh)
    exported.export_model(workdir / "model", params, model_state, DESCRIPTION)
    return workdir


@pytest.fixture
def paths(pixels, tmp_path) -> list[Path]:
    """The pixels as PNG files 0.png to 3.png."""
    return [save(tmp_path / f"{k}.png", image) for k, image in enumerate(pixels)]


@pytest.fixture
def run_predict(monkeypatch, capsys):
    """Runs `fmbench.predict` here: exit code, standard output and standard error."""
    monkeypatch.setattr(runtime, "set_up", lambda: None)  # is for a process of its own

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            predict.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def save(path: Path, pixels: np.ndarray) -> Path:
    PIL.Image.fromarray(pixels).save(path)
    return path


def told(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


# What `python -m fmbench.predict` does, where only Matplotlib cannot be imported.
WITHOUT_MATPLOTLIB = """
import runpy, sys
sys.modules["matplotlib"] = None
runpy.run_module("fmbench.predict", run_name="__main__", alter_sys=True)
"""


def test_a_fresh_process_without_data_predicts_what_this_one_does(model, workdir, pixels, paths, tmp_path):
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:100])
    arguments = [*paths[:3], tmp_path / "broken.png", tmp_path / "absent.png", *paths[3:]]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB, f"--model={workdir}", "--json", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"FMBENCH_CACHE": str(tmp_path / "cache"), "FMBENCH_DATA_DIR": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    for line, name in zip(process.stderr.splitlines(), ("broken.png", "absent.png"), strict=True):
        assert line.startswith(f"fmbench.predict: {tmp_path / name}: cannot read it as an image")
    predictions = told(process.stdout)
    assert [prediction["path"] for prediction in predictions] == [str(path) for path in paths]
    for prediction, row in zip(predictions, inference.classify(model, DESCRIPTION, pixels), strict=True):
        assert list(prediction) == ["path", "label", "class", "probability", "top3", "unlike_data"]
        assert prediction["unlike_data"] is None
        ranking = np.argsort(-row)
        assert prediction["label"] == ranking[0]
        assert prediction["class"] == fashion_mnist.CLASS_NAMES[ranking[0]]
        assert prediction["probability"] == pytest.approx(row[ranking[0]], rel=1e-4)
        assert prediction["top3"] == [
            [fashion_mnist.CLASS_NAMES[k], pytest.approx(row[k], rel=1e-4)] for k in ranking[:3]
        ]


def test_probabilities_are_the_softmax_of_the_logits(model, pixels):
    logits = np.asarray(model((pixels.reshape(4, 28, 28, 1) / 255 - 0.5) * 2))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = inference.classify(model, DESCRIPTION, pixels)
    assert (probabilities.shape, probabilities.dtype) == ((4, 10), np.float32)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
    np.testing.assert_allclose(inference.logits(model, DESCRIPTION, pixels), logits, rtol=1e-4, atol=1e-5)


def test_the_prediction_is_the_likeliest_class():
    probabilities = np.array([0, 0.1, 0, 0.2, 0, 0, 0.5, 0.2, 0, 0], np.float32)
    assert predict.describe(probabilities, fashion_mnist.CLASS_NAMES) == {
        "label": 6,
        "class": "Shirt",
        "probability": 0.5,
        "top3": [("Shirt", 0.5), ("Dress", pytest.approx(0.2)), ("Sneaker", pytest.approx(0.2))],
    }


def test_people_are_told_label_class_and_probabilities(workdir, paths, run_predict):
    code, out, err = run_predict("--model", workdir / "model", paths[0])
    assert (code, err) == (0, "")
    code, json_out, _ = run_predict("--model", workdir / "model", paths[0], "--json")
    (prediction,) = told(json_out)
    top3 = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction["top3"])
    assert out == f"{paths[0]}: label {prediction['label']}, {top3}\n"


def test_directories_and_standard_input_stand_for_their_images(
    workdir, pixels, paths, tmp_path, run_predict, monkeypatch
):
    (tmp_path / "notes.txt").write_text("no image")
    with paths[1].open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, out, err = run_predict("--model", workdir, "--json", "-", tmp_path)
    assert (code, err) == (0, "")
    first, *others = told(out)
    assert [prediction["path"] for prediction in others] == [str(path) for path in paths]
    assert first == others[1] | {"path": "-"}


def test_a_folder_names_what_cannot_be_read_in_it(workdir, paths, tmp_path, run_predict):
    for name in ("IMG_1.HEIC", "IMG_2.heic", "a.psd", "b.nef", "c.svg", "._0.png"):
        (tmp_path / name).touch()
    code, out, err = run_predict("--model", workdir, tmp_path)
    assert (code, out.count("\n")) == (1, 4)
    assert err == (
        f"fmbench.predict: left out {tmp_path}/IMG_1.HEIC, {tmp_path}/IMG_2.heic, {tmp_path}/a.psd and 2 more: "
        "such images cannot be read; make PNG or JPEG files of them.\n"
    )


def test_no_name_makes_a_line_of_its_own(workdir, pixels, tmp_path, run_predict):
    forged = tmp_path / "a\nb.png: label 1, Trouser 100.0%, Dress 0.0%, Coat 0.0%\n\x1b[A.png"
    no_text = tmp_path / os.fsdecode(b"caf\xe9.png")
    for path in (forged, no_text):
        save(path, pixels[0])
    figure = tmp_path / "figures" / "f.svg"
    figure.parent.mkdir()
    code, out, err = run_predict("--model", workdir, f"--figure={figure}", tmp_path)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith(
        rf"{tmp_path}/a\nb.png: label 1, Trouser 100.0%, Dress 0.0%, Coat 0.0%\n\x1b[A.png: label "
    )
    assert second.startswith(rf"{tmp_path}/caf\xe9.png: label ")
    code, out, _ = run_predict("--model", workdir, "--json", tmp_path)
    assert [prediction["path"] for prediction in told(out)] == [str(forged), str(no_text)]


@pytest.mark.parametrize(
    ("level", "said"), [(0, "nearly empty"), (255, "nearly empty"), (90, "nearly all of one grey")]
)
def test_an_empty_picture_is_no_confident_class_alone(workdir, tmp_path, run_predict, level, said):
    path = save(tmp_path / "a.png", np.full((28, 28), level, np.uint8))
    code, out, _ = run_predict("--model", workdir, path)
    assert code == 0
    assert out.endswith(f"%; but it is unlike the data: {said}\n")
    _, out, _ = run_predict("--model", workdir, path, "--json")
    assert told(out)[0]["unlike_data"] == said


def test_eight_bits_stored_as_sixteen_are_the_same_picture(workdir, pixels, tmp_path, run_predict):
    deep = save(tmp_path / "deep.png", pixels[0].astype(np.uint16))
    plain = save(tmp_path / "plain.png", pixels[0])
    _, out, _ = run_predict("--model", workdir, "--json", deep, plain)
    one, other = told(out)
    assert one | {"path": ""} == other | {"path": ""}


def test_the_training_data_are_not_needed(workdir, paths, run_predict, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("predict loaded the training data")

    monkeypatch.setattr(fashion_mnist, "load", refuse)
    assert run_predict("--model", workdir, *paths)[0] == 0


def test_images_are_classified_in_batches(workdir, paths, run_predict, monkeypatch):
    logits = mock.Mock(wraps=inference.logits)
    monkeypatch.setattr(inference, "logits", logits)
    _, at_once, _ = run_predict("--model", workdir, "--json", *paths)
    monkeypatch.setattr(inference, "BATCH_SIZE", 3)
    _, in_batches, _ = run_predict("--model", workdir, "--json", *paths)
    assert [len(call.args[2]) for call in logits.call_args_list] == [4, 3, 1]
    for one, other in zip(told(at_once), told(in_batches), strict=True):
        assert (one["path"], one["label"]) == (other["path"], other["label"])
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)


def test_negatives_are_inverted_unless_it_is_forbidden(workdir, pixels, tmp_path, run_predict, monkeypatch):
    logits = mock.Mock(return_value=np.zeros((2, 10), np.float32))
    monkeypatch.setattr(inference, "logits", logits)
    positive, negative = pixels[0], 255 - pixels[0]
    files = [save(tmp_path / "p.png", positive), save(tmp_path / "n.png", negative)]
    for flags in ([], ["--invert=auto"], ["--invert=yes"], ["--invert=no"]):
        assert run_predict("--model", workdir, *flags, *files)[0] == 0
    seen = [call.args[2] for call in logits.call_args_list]
    automatic = [positive, positive]
    np.testing.assert_array_equal(seen, [automatic, automatic, [negative, positive], [positive, negative]])


def test_nothing_readable_is_exit_code_1_and_no_figure(workdir, tmp_path, run_predict):
    code, out, err = run_predict("--model", workdir, f"--figure={tmp_path / 'f.png'}", tmp_path / "absent.png")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert not (tmp_path / "f.png").exists()


def test_a_figure_shows_each_image_as_the_model_sees_it_beside_its_probabilities(pixels):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(10), size=2).astype(np.float32)
    dark = list(pixels[:2] // 2)
    figure = predict.draw(["a$^^$.png", "c" * 100], dark, probabilities, fashion_mnist.CLASS_NAMES)
    figure.draw_without_rendering()
    left, right = figure.axes[::2], figure.axes[1::2]
    for axes, image in zip(left, dark, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
        assert axes.images[0].get_clim() == (0, 255)
    assert left[0].get_title() == "a$^^$.png"  # no formula
    for axes, row in zip(right, probabilities, strict=True):
        (bars,) = axes.containers
        assert isinstance(bars, BarContainer)
        np.testing.assert_array_equal(bars.datavalues, row)
        assert [label.get_text() for label in axes.get_yticklabels()] == list(fashion_mnist.CLASS_NAMES)
        assert axes.yaxis_inverted()


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_figures_are_written_as_their_name_says(workdir, paths, tmp_path, run_predict, ending, magic):
    figure = tmp_path / f"prediction.{ending}"
    code, out, err = run_predict("--model", workdir, f"--figure={figure}", *paths[:2])
    assert (code, out.count("\n"), err) == (0, 2, "")
    assert figure.read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--figure=x.pdf", "shirt.png"], "--figure=x.pdf: its name must end in .png or .svg."),
        (["--figure=x.png", *["shirt.png"] * 31], "--figure draws 30 images at the most, not 31;"),
        (["fmbench/models/../../configs"], "no images in this directory"),
    ],
)
def test_what_cannot_be_done_is_one_line(workdir, monkeypatch, run_predict, arguments, said):
    monkeypatch.chdir(REPOSITORY)
    code, out, err = run_predict("--model", workdir, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fmbench.predict: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_figure_that_cannot_be_written_is_one_line(workdir, paths, run_predict):
    code, _, err = run_predict("--model", workdir, f"--figure={paths[1]}/f.png", paths[0])
    assert code == 2
    assert err.count("\n") == 1


def test_images_must_be_named(workdir, run_predict):
    code, _, err = run_predict("--model", workdir)
    assert code == 2
    assert "the following arguments are required: image" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no exported model; name the work directory of a completed run."),
        ("{", "holds no model of this version of fmbench, or a damaged one (fmbench.json: is missing"),
    ],
)
def test_a_place_without_a_model_is_one_line(tmp_path, run_predict, content, said):
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    code, out, err = run_predict("--model", tmp_path, "shirt.png")
    assert (code, out) == (2, "")
    assert err.startswith(f"fmbench.predict: {tmp_path} {said}")
    assert err.count("\n") == 1
