"""Images in, labels out: from an exported model, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from fmbench import checkpoint, datasets, parallel, predict
from fmbench.errors import UserError
from fmbench.models import MODELS, split_model

REPOSITORY = Path(__file__).parents[1]
DESCRIPTION = {
    "entry": "cnn4",
    "model": {"name": "cnn4"},
    "dtype": "float32",
    "normalization": "symmetric",
    "class_names": datasets.CLASS_NAMES,
}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return datasets.load("sample").test_images[:4]


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
    checkpoint.export_model(workdir / "model", params, model_state, DESCRIPTION)
    return workdir


def save(path: Path, pixels: np.ndarray) -> Path:
    PIL.Image.fromarray(pixels).save(path)
    return path


def run_main(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `fmbench.predict` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        predict.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_a_fresh_process_predicts_what_this_one_does(model, workdir, pixels, tmp_path):
    paths = [save(tmp_path / f"{k}.png", image) for k, image in enumerate(pixels)]
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:100])
    arguments = [*paths[:3], tmp_path / "broken.png", tmp_path / "absent.png", *paths[3:]]
    process = subprocess.run(
        [sys.executable, "-m", "fmbench.predict", f"--model={workdir}", "--json", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    for line, name in zip(process.stderr.splitlines(), ("broken.png", "absent.png"), strict=True):
        assert line.startswith(f"fmbench.predict: {tmp_path / name}: cannot read it as an image")
    told = [json.loads(line) for line in process.stdout.splitlines()]
    assert [prediction["path"] for prediction in told] == [str(path) for path in paths]
    for prediction, image in zip(told, pixels, strict=True):
        here = predict.predict(model, DESCRIPTION, image)
        assert prediction.keys() == here.keys() | {"path"}
        assert prediction["label"] == here["label"]
        assert prediction["class"] == datasets.CLASS_NAMES[here["label"]]
        assert prediction["probability"] == pytest.approx(here["probability"], rel=1e-4)
        assert [name for name, _ in prediction["top3"]] == [name for name, _ in here["top3"]]


def test_the_prediction_is_the_softmax_of_the_logits(model, pixels):
    prediction = predict.predict(model, DESCRIPTION, pixels[0])
    logits = np.asarray(model((pixels[:1].reshape(1, 28, 28, 1) / 255 - 0.5) * 2))[0]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    ranking = np.argsort(-probabilities)
    assert prediction["label"] == ranking[0]
    assert prediction["probability"] == pytest.approx(probabilities[ranking[0]], rel=1e-4)
    assert prediction["top3"] == [
        (datasets.CLASS_NAMES[k], pytest.approx(probabilities[k], rel=1e-4)) for k in ranking[:3]
    ]


def test_an_exported_model_may_be_named_itself(workdir, pixels, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "shirt.png", pixels[0])
    code, out, err = run_main(monkeypatch, capsys, "--model", workdir / "model", path)
    assert (code, err) == (0, "")
    assert out.startswith(f"{path}: ")
    assert out.count("%") == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no exported model; name the work directory of a completed run."),
        ("{", "holds no model of this version of fmbench (JSONDecodeError"),
        ('{"dtype": "float32"}', "holds no model of this version of fmbench (KeyError"),
        (
            '{"model": {"name": "lenet"}, "dtype": "float32", "normalization": "unit", "class_names": []}',
            "holds no model of this version of fmbench (KeyError: 'lenet')",
        ),
    ],
)
def test_a_place_without_a_model_is_one_line(tmp_path, monkeypatch, capsys, content, said):
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    code, out, err = run_main(monkeypatch, capsys, "--model", tmp_path, "shirt.png")
    assert (code, out) == (2, "")
    assert err.startswith(f"fmbench.predict: {tmp_path} {said}")
    assert err.count("\n") == 1


# Reading images.


def test_pixels_of_the_right_size_are_taken_as_they_are(pixels, tmp_path):
    np.testing.assert_array_equal(predict.read_image(save(tmp_path / "grey.png", pixels[0])), pixels[0])


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (28, 28)), ("RGBA", (300, 200)), ("L", (1, 1)), ("P", (28, 56)), ("1", (90, 28))]
)
def test_other_modes_and_sizes_become_grey_28_by_28(mode, size, tmp_path):
    PIL.Image.new(mode, size, color="white" if mode != "1" else 1).save(tmp_path / "white.png")
    white = predict.read_image(tmp_path / "white.png")
    assert (white.shape, white.dtype) == ((28, 28), np.uint8)
    assert (white == 255).all()


def test_colours_become_their_luminance(tmp_path):
    PIL.Image.new("RGB", (28, 28), (255, 0, 0)).save(tmp_path / "red.png")
    assert (predict.read_image(tmp_path / "red.png") == 76).all()  # 0.299 * 255


def test_sixteen_bits_are_scaled_not_cut_off(pixels, tmp_path):
    deep = pixels[0].astype(np.uint16) * 257
    np.testing.assert_array_equal(predict.read_image(save(tmp_path / "deep.png", deep)), pixels[0])


def test_reducing_keeps_the_picture(pixels, tmp_path):
    large = np.kron(pixels[0], np.ones((8, 8), np.uint8))
    reduced = predict.read_image(save(tmp_path / "large.png", large))
    assert np.abs(reduced.astype(int) - pixels[0]).mean() < 10


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png: cannot read it as an image"):
        predict.read_image(tmp_path / "broken.png")


def test_an_image_that_claims_to_be_huge_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", np.zeros((28, 28), np.uint8))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"bomb\.png: cannot read it as an image"):
        predict.read_image(path)
