"""Images in the plane: where they lie, how they are drawn, and what TensorBoard reads."""

import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest
from fake_models import arbitrary_model
from fake_records import make_record
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fmbench import embed
from fmbench.data import fashion_mnist, features
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.pages import embedding
from fmbench.records import store
from fmbench.system import runtime
from fmbench.training import inference
from fmbench.training.input_pipeline import normalize

NAMES = [f"class {k}" for k in range(10)]


@pytest.fixture(scope="module")
def sample() -> fashion_mnist.Dataset:
    return fashion_mnist.load("sample")


@pytest.fixture(scope="module")
def model() -> Any:
    return arbitrary_model("cnn2")


def run_main(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `fmbench.embed` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["embed", *map(str, arguments)])
    monkeypatch.setattr(runtime, "set_up", lambda: None)
    code = 0
    try:
        embed.main()
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Features.


def test_features_without_a_layer_are_what_the_head_is_given(model, sample, monkeypatch):
    monkeypatch.setattr(inference, "BATCH_SIZE", 2)  # the last batch holds one
    images = sample.test_images[:5]
    vectors = inference.layer_features(model, images, "symmetric", None)
    assert (vectors.shape, vectors.dtype) == ((5, 32), np.float32)
    logits = np.asarray(model(normalize(images, "symmetric")))
    np.testing.assert_allclose(nnx.log_sigmoid(model.head(vectors)), logits, atol=1e-5)
    assert isinstance(model.head, nnx.Linear)


def test_features_of_a_layer_are_what_it_returns(model, sample):
    vectors = inference.layer_features(model, sample.test_images[:3], "unit", "conv1")
    expected = np.asarray(model.conv1(normalize(sample.test_images[:3], "unit"))).reshape(3, -1)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_an_unknown_layer_is_told_those_there_are(model, sample):
    with pytest.raises(UserError, match=r"--layer=dense: .* it has conv1, conv2, dense1, dropout1, head\."):
        inference.layer_features(model, sample.test_images[:3], "unit", "dense")


def test_a_model_on_features_is_given_features(sample, monkeypatch):
    def load(images, sha256, spec):
        assert (sha256, spec.backbone) == (sample.sha256["t10k-images"], "vgg19")
        return images.reshape(len(images), -1)[:, :6].astype(np.float16)

    monkeypatch.setattr(features, "load", load)
    spec = {"backbone": "vgg19", "weights": "", "image_size": 150, "preprocessing": "imagenet"}
    inputs = embed.backbone_features(sample, "test", spec)
    head = arbitrary_model("transfer_head", num_features=6)
    vectors = inference.layer_features(head, inputs, "none", "dense1")
    np.testing.assert_allclose(vectors, head.dense1(sample.test_images.reshape(200, -1)[:, :6]), atol=1e-4)


# t-SNE.


def test_t_sne_keeps_clusters_apart_and_is_repeatable():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(0, 1, (20, 30)), rng.normal(20, 1, (20, 30))]).astype(np.float32)
    positions = embedding.t_sne(vectors)
    assert positions.shape == (40, 2)
    left, right = positions[:20], positions[20:]
    assert np.linalg.norm(left.mean(axis=0) - right.mean(axis=0)) > 2 * max(np.ptp(left), np.ptp(right)) / 2
    np.testing.assert_array_equal(embedding.t_sne(vectors), positions)


# Drawing.


def test_thumbnails_do_not_touch_and_leave_no_room_for_more():
    positions = np.random.default_rng(0).uniform(size=(300, 2))
    chosen = embedding.apart(positions, 0.1)
    assert chosen[0] == 0
    distance = np.abs(positions[:, None] - positions[chosen]).max(axis=2)
    among_themselves = distance[chosen] + np.eye(len(chosen))
    assert among_themselves.min() >= 0.1
    assert distance.min(axis=1).max() < 0.1


@pytest.mark.parametrize("stretch", [(1, 1), (3, 1), (1, 3)])
def test_the_drawing_shows_classes_thumbnails_and_a_legend_beside_the_axes(sample, stretch):
    positions = np.random.default_rng(0).normal(5, 3, size=(200, 2)) * stretch
    figure = embedding.draw(
        positions, sample.test_labels, sample.test_images, "t-SNE in 1.0 s\nrun " + "x" * 150, NAMES
    )
    FigureCanvasAgg(figure).draw()
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(NAMES)
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert figure.bbox.x1 >= legend.get_window_extent().x1

    # Points: all of them, in the legend's colours, not distorted.
    assert sum(len(np.asarray(points.get_offsets())) for points in axes.collections) == 200
    drawn = np.asarray(axes.collections[3].get_offsets())
    original = positions[sample.test_labels == 3]
    np.testing.assert_allclose(drawn - drawn[0], (original - original[0]) / np.ptp(positions, axis=0).max())
    assert axes.get_aspect() == 1

    # Thumbnails: on their points, framed in the colour of the class.
    scaled = (positions - positions.min(axis=0)) / np.ptp(positions, axis=0).max()
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(frames) == len(axes.images) == len(embedding.apart(scaled, embedding.THUMBNAIL_SIDE * 1.1)) > 5
    boxes = [image.get_window_extent() for image in axes.images]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for image, frame in zip(axes.images, frames, strict=True):
        left, right, bottom, top = image.get_extent()
        nearest = np.abs(scaled - ((left + right) / 2, (bottom + top) / 2)).sum(axis=1).argmin()
        np.testing.assert_array_equal(image.get_array(), sample.test_images[nearest])
        colour = axes.collections[sample.test_labels[nearest]].get_facecolor()
        assert to_rgba(frame.get_edgecolor()) == tuple(np.asarray(colour)[0])


# The Embedding Projector.


def test_the_projector_gets_vectors_metadata_and_sprite(sample, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for _ in range(2):  # the second time replaces the first
        embedding.write_projector(tmp_path / "run", vectors, sample.test_labels[:5], sample.test_images[:5], NAMES)
    config = (tmp_path / "run" / "projector_config.pbtxt").read_text()
    files = dict(re.findall(r'(\w+_path): "([\w.]+)"', config))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        [*files.values(), "projector_config.pbtxt"]
    )
    assert config.count("embeddings {") == 1
    assert re.findall(r"single_image_dim: (\d+)", config) == ["28", "28"]

    rows = np.loadtxt(tmp_path / "run" / files["tensor_path"], dtype=np.float32, delimiter="\t")
    np.testing.assert_allclose(rows, vectors, rtol=1e-6)
    header, *lines = (tmp_path / "run" / files["metadata_path"]).read_text().splitlines()
    assert header == "Index\tLabel"
    assert lines == [f"{k}\t{NAMES[sample.test_labels[k]]}" for k in range(5)]

    with PIL.Image.open(tmp_path / "run" / files["image_path"]) as image:
        sprite = np.asarray(image)
    assert sprite.shape == (3 * 28, 3 * 28)
    for k in range(5):
        row, column = divmod(k, 3)
        cell = sprite[row * 28 : (row + 1) * 28, column * 28 : (column + 1) * 28]
        np.testing.assert_array_equal(cell, 255 - sample.test_images[k])
    assert (sprite[28:, 56:] == 255).all()
    assert (sprite[56:] == 255).all()


def test_a_place_the_projector_cannot_have_is_named(sample, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x cannot be written to .*; name another --output"):
        embedding.write_projector(
            tmp_path / "file" / "x", np.zeros((1, 2)), sample.test_labels[:1], sample.test_images[:1], NAMES
        )


def test_the_whole_data_set_fits_into_a_sprite():
    side, _ = embedding.sprite(np.zeros((60_000, 28, 28), np.uint8)).shape
    assert side <= 8192


# The command.


def test_pixels_of_the_test_set_are_embedded(sample, monkeypatch, tmp_path, capsys):
    given = []

    def t_sne(vectors):
        given.append(vectors)
        return vectors[:, 300:302]

    def draw(positions, labels, images, title, class_names):
        given.extend([positions, labels, images, title, class_names])
        return Figure()

    monkeypatch.setattr(fashion_mnist, "load", lambda: sample)
    monkeypatch.setattr(embedding, "t_sne", t_sne)
    monkeypatch.setattr(embedding, "draw", draw)
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(monkeypatch, capsys, "--num_images=20", "--projector")
    assert (code, err) == (0, "")
    directory = Path("figures/embedding")
    assert out.splitlines()[0] == str(directory / "tsne-pixels.png")
    assert str(directory / "projector" / "pixels") in out.splitlines()[1]
    assert (directory / "tsne-pixels.png").exists()
    vectors, positions, labels, images, title, class_names = given
    assert class_names == sample.class_names
    np.testing.assert_allclose(vectors, sample.test_images[:20].reshape(20, 784) / 255, rtol=1e-6)
    np.testing.assert_array_equal(positions, vectors[:, 300:302])
    np.testing.assert_array_equal(labels, sample.test_labels[:20])
    np.testing.assert_array_equal(images, sample.test_images[:20])
    assert re.fullmatch(r"t-SNE of 20 test images in \d+\.\d s\npixels", title)
    rows = np.loadtxt(directory / "projector" / "pixels" / "vectors.tsv", dtype=np.float32, delimiter="\t")
    np.testing.assert_allclose(rows, vectors, rtol=1e-6)


def test_features_of_a_run_are_embedded(sample, model, monkeypatch, tmp_path, capsys):
    given = []

    def t_sne(vectors):
        given.append(vectors)
        return vectors[:, :2]

    monkeypatch.setattr(store, "read_run", lambda workdir: (make_record("cnn2"), sample))
    monkeypatch.setattr(exported, "load_model", lambda workdir: (model, {"normalization": "symmetric"}))
    monkeypatch.setattr(embedding, "t_sne", t_sne)
    arguments = ("--model=w", "--split=train", "--num_images=10", f"--output={tmp_path}", "--format=svg")
    path = tmp_path / "tsne-cnn2-cpu-abacus-9-2c-float32-seed0-dense1.svg"
    assert run_main(monkeypatch, capsys, *arguments, "--layer=dense1") == (0, f"{path}\n", "")
    np.testing.assert_allclose(
        given[0], inference.layer_features(model, sample.train_images[:10], "symmetric", "dense1"), atol=1e-5
    )
    ElementTree.parse(path)
    path = tmp_path / "tsne-cnn2-cpu-abacus-9-2c-float32-seed0-features.svg"
    assert run_main(monkeypatch, capsys, *arguments) == (0, f"{path}\n", "")


@pytest.mark.parametrize("number", [9, 201])
def test_a_number_of_images_that_cannot_be_is_one_line(sample, monkeypatch, capsys, number):
    monkeypatch.setattr(fashion_mnist, "load", lambda: sample)
    code, out, err = run_main(monkeypatch, capsys, f"--num_images={number}")
    said = f"--num_images={number}: it must be from 10 to 200, the size of the test set."
    assert (code, out, err) == (2, "", f"fmbench.embed: {said}\n")


def test_a_layer_is_some_models(monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, "--layer=dense1")
    assert (code, out) == (2, "")
    assert err.startswith("fmbench.embed: --layer needs --model, the run whose layer it is; ")
