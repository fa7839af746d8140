"""What the figures show, and that it can be read."""

import itertools
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import PIL.Image
import pytest
from fake_models import arbitrary_state
from fake_records import EPOCH, make_record, make_unfinished
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from fmbench import config, figures
from fmbench.data import fashion_mnist
from fmbench.data.fashion_mnist import CLASS_NAMES
from fmbench.errors import UserError
from fmbench.models import confidence, exported
from fmbench.pages import drawing
from fmbench.records import schema, store
from fmbench.system import runtime

WRONG_ROWS = (3, 10, 199)


@pytest.fixture(scope="module")
def sample() -> fashion_mnist.Dataset:
    return fashion_mnist.load("sample")


@pytest.fixture(scope="module")
def of_sample(sample):
    """Fields of a record made on the sample, and its predictions: three are wrong."""
    predictions = sample.test_labels.copy()
    predictions[list(WRONG_ROWS)] = (predictions[list(WRONG_ROWS)] + 1) % 10
    stage = {"learning_rate": 0.1, "augment": {}, "train_seconds": 1.0, "train_core_seconds": 1.0}
    stage |= {"val_accuracy": 0.8, "test_accuracy": 0.8}
    data = config.base_config().data.to_dict() | {"source": "sample"}
    return predictions, {
        "entry": "cnn3",
        "config": {"data": data, "num_epochs": 3},
        "num_epochs": 3,
        "history": [EPOCH | {"epoch": epoch} for epoch in (1, 2, 3)],
        "stages": [stage | {"name": "stage1", "num_epochs": 1}, stage | {"name": "stage2", "num_epochs": 2}],
        "data_version": "sample",
        "data_sha256": sample.sha256,
        "predictions_sha256": schema.predictions_sha256(predictions),
    }


@pytest.fixture(scope="module")
def workdir(of_sample, tmp_path_factory) -> Path:
    """Of a completed run: record, predictions and a model with arbitrary numbers."""
    workdir = tmp_path_factory.mktemp("workdir")
    predictions, fields = of_sample
    store.write(make_record(**fields), predictions, workdir / "record")
    _, params, model_state = arbitrary_state("cnn3")
    description = {"model": {"name": "cnn3"}, "dtype": "float32", "normalization": "unit"}
    exported.export_model(workdir / "model", params, model_state, description | {"class_names": CLASS_NAMES})
    return workdir


def run_main(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `fmbench.figures` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    monkeypatch.setattr(runtime, "set_up", lambda: None)
    code = 0
    try:
        figures.main()
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def epochs(*losses: float, prefix: str = "val") -> list[schema.Epoch]:
    held_out = {"val_loss": None, "val_accuracy": None}
    return [
        schema.Epoch(
            **EPOCH
            | held_out
            | {"epoch": epoch, "train_loss": loss, "train_accuracy": loss / 10}
            | ({f"{prefix}_loss": loss + 0.1, f"{prefix}_accuracy": loss / 20} if prefix else {})
        )
        for epoch, loss in enumerate(losses, start=1)
    ]


def lines(axes, colour) -> list[tuple[list[float], list[float]]]:
    return [
        (np.round(line.get_xdata(), 9).tolist(), np.round(line.get_ydata(), 9).tolist())
        for line in axes.lines
        if same_color(line.get_color(), colour)
    ]


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def picture(axes) -> Any:
    """The array of the image in the axes, masked where it is NaN."""
    (image,) = axes.images
    return image.get_array()


# Saving.


def test_the_same_figure_is_saved_as_the_same_bytes(tmp_path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        drawing.save(drawing.learning_curves([epochs(2.0, 1.0)], "twice"), tmp_path / "new" / name)
    svg, png = ((tmp_path / "new" / f"a.{ending}").read_bytes() for ending in ("svg", "png"))
    assert (tmp_path / "new" / "b.svg").read_bytes() == svg
    assert (tmp_path / "new" / "b.png").read_bytes() == png
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert b"<dc:date>" not in svg
    assert len(list((tmp_path / "new").iterdir())) == 4  # no temporary files


def test_png_has_150_dots_per_inch(tmp_path):
    drawing.save(Figure(figsize=(4, 2)), tmp_path / "empty.png")
    with PIL.Image.open(tmp_path / "empty.png") as image:
        assert image.size == (600, 300)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x\.png: cannot write the figure"):
        drawing.save(Figure(), tmp_path / "file" / "x.png")


# Single figures.


def test_learning_curves_of_one_run():
    figure = drawing.learning_curves([epochs(4.0, 3.0, 2.0)], "a run", stage_ends=[2])
    loss, accuracy = figure.axes
    assert lines(loss, drawing.TRAIN) == [([1, 2, 3], [4, 3, 2])]
    assert lines(loss, drawing.HELD_OUT) == [([1, 2, 3], [4.1, 3.1, 2.1])]
    assert lines(accuracy, drawing.TRAIN) == [([1, 2, 3], [40, 30, 20])]
    assert lines(accuracy, drawing.HELD_OUT) == [([1, 2, 3], [20, 15, 10])]
    assert lines(loss, "grey") == lines(accuracy, "grey") == [([2, 2], [0, 1])]
    assert legend_of(figure) == ["train", "held out (validation)"]
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("epoch (dashed grey: a stage ends)", "accuracy (%)")
    assert loss.get_position().y0 > accuracy.get_position().y0


def test_several_runs_are_told_apart():
    histories = [epochs(4.0, 3.0, 2.0), epochs(5.0, 1.0)]
    figure = drawing.learning_curves(histories, "folds", names=["fold 1", "fold 2"])
    for colour, train, held_out in (
        (drawing.RUNS[0], ([1, 2, 3], [4, 3, 2]), ([1, 2, 3], [4.1, 3.1, 2.1])),
        (drawing.RUNS[1], ([1, 2], [5, 1]), ([1, 2], [5.1, 1.1])),
    ):
        assert lines(figure.axes[0], colour) == [train, held_out]
        assert [line.get_linestyle() for line in figure.axes[0].lines if line.get_color() == colour] == ["--", "-"]
    assert legend_of(figure) == ["fold 1", "fold 2", "train", "held out (validation)"]
    looks = [
        (line.get_color(), line.get_marker(), line.get_linestyle())
        for line in drawing.learning_curves([epochs(2.0, 1.0)] * 20, "many").axes[0].lines
    ]
    assert len(set(looks)) == len(looks) == 40


def test_a_single_epoch_makes_bars_with_numbers():
    for histories in ([epochs(4.0)], [epochs(4.0), epochs(5.0)]):
        loss, accuracy = drawing.learning_curves(histories, "short", stage_ends=[1]).axes
        bars = [bar for container in accuracy.containers for bar in container]
        assert [round(bar.get_height(), 9) for bar in bars] == [40, 50, 20, 25][:: 3 - len(histories)]
        assert [text.get_text() for text in loss.texts] == ["4", "5", "4.1", "5.1"][:: 3 - len(histories)]
        assert [label.get_text() for label in accuracy.get_xticklabels()] == ["train", "held out (validation)"]
        assert all(bar.get_y() == 0 for bar in bars) and not accuracy.lines
        spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("prefix", "legend"), [("test", ["train", "held out (test)"]), ("", ["train"])], ids=["test", "nothing"]
)
def test_learning_curves_say_what_was_watched(prefix, legend):
    figure = drawing.learning_curves([epochs(4.0, 3.0, prefix=prefix)], "run")
    assert legend_of(figure) == legend
    assert [len(axes.lines) for axes in figure.axes] == [len(legend)] * 2


def test_epochs_are_whole_numbers():
    figure = drawing.learning_curves([epochs(4.0, 3.0)], "run")
    FigureCanvasAgg(figure).draw()
    left, right = figure.axes[1].get_xlim()
    assert [tick for tick in figure.axes[1].get_xticks() if left <= tick <= right] == [1, 2]


def test_few_scores_are_points_and_many_have_a_box():
    many = [0.5 + 0.01 * number for number in range(drawing.LEAST_FOR_A_BOX)]
    scores = {"cnn1 with\nsome-name=that-is-longer-than-thirty-characters": [0.9, 0.91, 0.95], "many": many}
    axes = drawing.box_plot(scores, "scores").axes[0]
    points = [([90, 91, 95], [1, 1, 1]), (np.round(100 * np.array(many), 9).tolist(), [2] * len(many))]
    assert lines(axes, drawing.HELD_OUT) == points
    means = [([92], [1]), ([54.5], [2])]
    assert [line for line in lines(axes, matplotlib.rcParams["text.color"]) if len(line[0]) == 1] == means
    medians = lines(axes, "grey")  # a line up through the box, and there is one box
    assert [median[0] for median in medians] == [[54.5, 54.5]]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"{name}\nn = {len(values)}" for name, values in scores.items()]  # no word is broken
    assert axes.yaxis_inverted()
    assert axes.get_xlabel() == "accuracy (%); the stroke is the mean"


def test_titles_are_in_words():
    assert drawing.in_words("mlp") == "mlp"
    assert drawing.in_words("cnn1+a.b=c+num_epochs=10") == "cnn1 with a.b=c, num_epochs=10"
    figure = drawing.titled("Learning curves of baseline-same with optimizer.learning_rate=0.1 (seed 0)", 3.2, 3)
    assert "baseline-same" in figure.get_suptitle().split()


def test_confusion_matrix_has_true_classes_in_rows():
    labels, predictions = np.array([0, 0, 0, 0, 7]), np.array([0, 0, 0, 2, 7])
    axes = drawing.confusion_matrix(labels, predictions, "few images", CLASS_NAMES).axes[0]
    shown = np.zeros((10, 10), int)
    for text in axes.texts:
        column, row = map(int, text.get_position())
        shown[row, column] = int(text.get_text())
    assert {(i, j): shown[i, j] for i, j in np.argwhere(shown)} == {(0, 0): 3, (0, 2): 1, (7, 7): 1}
    fractions = picture(axes)
    assert not fractions.mask.any()  # classes without images have zeros
    assert (fractions[0, 0], fractions[0, 2], fractions[7, 7], fractions.sum()) == (0.75, 0.25, 1, 2)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASS_NAMES)


def test_a_reliability_diagram_has_a_panel_for_each_temperature():
    rows = np.eye(10)[[0, 0, 1]] * 0.8 + 0.02
    bins = {t: confidence.bins(rows, np.array([0, 1, 1])) for t in (1.0, 0.62)}
    figure = drawing.reliability_diagram(bins, "run")
    first, second, *_ = figure.axes
    assert first.get_title().splitlines() == ["as the net gives them", "expected calibration error 15.33%"]
    assert second.get_title().startswith("at the temperature 0.62\n")
    heights, counts = (axes.containers[0].datavalues for axes in (first, figure.axes[2]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(counts, [0] * 12 + [3] + [0] * 2)
    assert (np.isnan(heights).sum(), heights[12]) == (14, pytest.approx(200 / 3))


@pytest.mark.parametrize(
    ("caption", "columns", "inches"),
    [("T-shirt/top", 15, 0.9), ("predicted Ankle boot\ntrue T-shirt/top", 3, 1.7)],
)
def test_captions_of_a_grid_do_not_touch(caption, columns, inches):
    images = np.zeros((2 * columns - 1, 28, 28), np.uint8)
    long = "cnn3+optimizer.learning_rate=0.001" * 10
    figure = drawing.image_grid(images, [caption] * len(images), long, columns=columns, inches=inches)
    captions = [axes.title for axes in figure.axes if axes.get_title()]
    assert len(captions) == len(images)
    (title,) = figure.findobj(lambda artist: getattr(artist, "get_text", str)() == figure.get_suptitle())
    FigureCanvasAgg(figure).draw()
    boxes, page = [text.get_window_extent() for text in (*captions, title)], figure.bbox
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1 for box in boxes)
    pictures = [axes.get_window_extent() for axes in figure.axes if axes.images]
    assert not any(box.overlaps(picture) for box in boxes for picture in pictures)


def test_a_grid_may_be_empty(tmp_path):
    images = np.zeros((0, 28, 28), np.uint8)
    drawing.save(drawing.image_grid(images, [], "nothing wrong", columns=3, inches=1), tmp_path / "empty.png")


def test_activation_maps_stand_eight_in_a_row():
    maps = np.arange(70) + np.zeros((14, 12, 1))
    image, shown, _ = drawing.activation_maps(np.zeros((28, 28), np.uint8), maps, "layer").axes
    assert shown.images[0].get_clim() == (-63, 63)  # 0 is in the middle, which is white
    assert np.allclose(shown.images[0].get_cmap()(0.5)[:3], 0.97, atol=0.01)
    assert shown.get_title() == "maps 1 to 64 of 70, row by row"
    mosaic = picture(shown)
    assert mosaic.shape == (8 * 15 - 1, 8 * 13 - 1)
    np.testing.assert_array_equal(mosaic[::15, ::13], np.arange(64).reshape(8, 8))
    np.testing.assert_array_equal(mosaic[13::15, 11::13], np.arange(64).reshape(8, 8))
    assert mosaic.mask[14].all()
    assert mosaic.mask[:, 12].all()
    assert mosaic.mask.sum() == mosaic.size - 64 * 14 * 12
    assert picture(image).shape == (28, 28)


def test_few_maps_leave_no_room_beside_them():
    for value, most in ((-2.0, 2), (0.0, 1)):
        maps = np.full((14, 12, 3), value)
        _, shown, _ = drawing.activation_maps(np.zeros((28, 28), np.uint8), maps, "layer").axes
        assert picture(shown).shape == (14, 3 * 13 - 1)
        assert shown.images[0].get_clim() == (-most, most)


# A run, and the data.


def test_a_run_is_drawn_from_its_record_predictions_and_model(workdir, sample, monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, "--model", workdir, "--format=png")
    assert (code, err) == (0, "")
    names = ["learning-curves", "confusion-matrix", "reliability", "right", "wrong"]
    names += [f"activations-conv{k}" for k in (1, 2, 3)]
    paths = [workdir / "figures" / f"{name}.png" for name in names]
    assert out.splitlines() == [str(path) for path in paths]
    for path in paths:
        PIL.Image.open(path).verify()
        with PIL.Image.open(path) as image:
            assert image.convert("L").getpixel((0, 0)) == 255


def test_dark_figures_are_light_on_black(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fashion_mnist, "load", lambda: sample)
    assert run_main(monkeypatch, capsys, "data", "--dark", f"--output={tmp_path}")[0] == 0
    with PIL.Image.open(tmp_path / "first-9.png") as image:
        grey = np.asarray(image.convert("L"))
    assert (grey[0, 0], grey[:40].max()) == (0, 255)  # the paper, and the title


def test_right_and_wrong_images_carry_both_classes(workdir, sample):
    drawn = dict(figures.of_run(workdir, "0"))
    wrong = [axes for axes in drawn["wrong"].axes if axes.images]
    assert len(wrong) == 3
    for axes, row in zip(wrong, WRONG_ROWS, strict=True):
        np.testing.assert_array_equal(picture(axes), sample.test_images[row])
        label = sample.test_labels[row]
        assert axes.get_title() == f"predicted {CLASS_NAMES[(label + 1) % 10]}\ntrue {CLASS_NAMES[label]}"
    right = [axes for axes in drawn["right"].axes if axes.images]
    for axes, row in zip(right, (0, 1, 2, 4, 5, 6, 7, 8, 9), strict=True):
        np.testing.assert_array_equal(picture(axes), sample.test_images[row])
        assert axes.get_title() == "predicted {0}\ntrue {0}".format(CLASS_NAMES[sample.test_labels[row]])
    assert "197 of 200 test images right" in drawn["confusion-matrix"].get_suptitle()
    # The end of the last stage is the end of the run.
    assert lines(drawn["learning-curves"].axes[0], "grey") == [([1, 1], [0, 1])]


@pytest.mark.parametrize("as_file", [False, True])
def test_activations_are_those_of_the_chosen_image(workdir, sample, as_file, tmp_path):
    image = "17"
    if as_file:
        image = str(tmp_path / "seventeen.png")
        PIL.Image.fromarray(sample.test_images[17]).save(image)
    drawn = dict(figures.of_run(workdir, image))["activations-conv2"]
    what = "seventeen.png" if as_file else f"test image 17, {CLASS_NAMES[sample.test_labels[17]]}"
    assert drawn.get_suptitle() == f"What conv2 (11 x 11 x 64) of cnn3 (seed 0, float32) makes of {what}"
    left, right, _ = drawn.axes
    np.testing.assert_array_equal(picture(left), sample.test_images[17])
    model: Any = exported.load_model(workdir)[0]
    pooled = nnx.relu(nnx.max_pool(model.conv1(sample.test_images[17:18, :, :, None] / 255), (2, 2), (2, 2)))
    maps = np.asarray(model.conv2(pooled))[0]
    np.testing.assert_allclose(picture(right)[:11, 12:23], maps[:, :, 1], atol=1e-5)


def test_the_data_are_drawn(sample):
    drawn = dict(figures.of_data(sample))
    for name, number in (("first-9", 9), ("first-225", 225)):
        for axes, image, label in zip(drawn[name].axes, sample.train_images, sample.train_labels, strict=False):
            np.testing.assert_array_equal(picture(axes), image)
            assert axes.get_title() == CLASS_NAMES[label]
        assert len(drawn[name].axes) == number
    bags = drawn["class-means"].axes[8]
    chosen = sample.train_images[sample.train_labels == 8]
    assert bags.get_title() == f"Bag\n{len(chosen)} images"
    np.testing.assert_allclose(picture(bags), chosen.astype(float).mean(axis=0))


def test_figures_of_the_data_go_where_they_are_told_to(sample, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fashion_mnist, "load", lambda: sample)
    monkeypatch.setattr(figures, "of_data", lambda dataset: [(dataset.version, Figure())])
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, capsys, "data") == (0, "figures/sample.png\n", "")
    assert run_main(monkeypatch, capsys, "data", "--output=o", "--format=svg") == (0, "o/sample.svg\n", "")
    assert Path("figures/sample.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse("o/sample.svg")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image=200"], "--image=200: the test set has 200 images, numbered from 0."),
        (["--image=absent.png"], "absent.png: cannot read it as an image"),
    ],
)
def test_an_image_that_is_not_there_is_one_line(workdir, monkeypatch, capsys, arguments, said):
    code, out, err = run_main(monkeypatch, capsys, f"--model={workdir}", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"fmbench.figures: {said}")
    assert err.count("\n") == 1


def test_only_completed_runs_on_the_same_data_are_drawn(tmp_path, of_sample):
    with pytest.raises(UserError, match="holds no record; name the work directory of a completed run"):
        store.read_run(tmp_path)
    predictions, fields = of_sample
    interrupted = make_unfinished("interrupted")
    store.write(interrupted, None, tmp_path / "record")
    with pytest.raises(UserError, match="holds a run that is interrupted; complete it first"):
        store.read_run(tmp_path)
    store.write(
        make_record(**fields | {"data_sha256": {"t10k-labels": "0" * 64}}), predictions, tmp_path / "record"
    )
    with pytest.raises(UserError, match="holds a run on data of version sample"):
        store.read_run(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["data", "--model=x"], ["--model=x", "--format=pdf"]])
def test_what_to_draw_must_be_said_once(monkeypatch, capsys, arguments):
    code, out, err = run_main(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fmbench.figures: ") and err.count("\n") == 1
