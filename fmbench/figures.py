"""Draws what a completed run learnt and got wrong, and what the data look like.

    python -m fmbench.figures --model=workdirs/cnn3-cpu-float32-seed0
    python -m fmbench.figures --model=workdirs/cnn3-cpu-float32-seed0 --image=shirt.png --format=svg
    python -m fmbench.figures data

Of a run: learning curves, the confusion matrix of the test set, nine right and nine wrong test images, and what
every convolution returns for one image. Of the data: the first nine train images, the first 225 with classes, and
the mean image of every class.
"""

import argparse
import itertools
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from fmbench import activations, checkpoint, datasets, input_pipeline, photos, results, runtime
from fmbench.datasets import CLASS_NAMES
from fmbench.errors import UserError

TRAIN, HELD_OUT = "tab:blue", "tab:orange"
MOST_MAPS, MAPS_PER_ROW = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmbench.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", nargs="?", choices=["data"], help="draw the data, and no run")
    parser.add_argument("--model", type=Path, help="work directory of the completed run to draw")
    parser.add_argument(
        "--output", type=Path, help="directory of the figures (default: figures, in the run's own)"
    )
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    parser.add_argument(
        "--image",
        default="0",
        help="whose activations are drawn: a number in the test set, or a file (default: 0)",
    )
    arguments = parser.parse_args()
    if (arguments.subject is None) == (arguments.model is None):
        parser.error("name a run, as in --model=workdirs/cnn3-cpu-float32-seed0, or say data")
    runtime.set_up()
    try:
        if arguments.model:
            output = arguments.output or arguments.model / "figures"
            figures = of_run(arguments.model, arguments.image)
        else:
            output = arguments.output or Path("figures")
            figures = of_data(datasets.load())
        for name, figure in tqdm(figures, desc="drawing", unit="figure", disable=None):
            path = output / f"{name}.{arguments.format}"
            save(figure, path)
            tqdm.write(f"{path}")
    except UserError as error:
        print(f"fmbench.figures: {error}", file=sys.stderr)
        sys.exit(2)


def of_run(workdir: Path, image: str) -> Iterator[tuple[str, Figure]]:
    """Draws a completed run: yields names, without ending, and figures.

    Args:
        workdir: Its work directory.
        image: The number of a test image, or the path of any other.

    Raises:
        UserError: If there is no completed run, or no such image.
    """
    record, dataset = read_run(workdir)
    predictions = results.read_predictions(record, workdir / "record.npy")
    model, description = checkpoint.load_model(workdir)
    pixels, what = _choose_image(dataset, image)
    run = f"{record.entry}, seed {record.seed}, {record.dtype}"

    stage_ends = list(itertools.accumulate(stage.num_epochs for stage in record.stages))[:-1]
    yield "learning-curves", learning_curves([record.history], run, stage_ends)

    right = predictions == dataset.test_labels
    score = f"{right.sum():,} of {len(right):,} test images right"
    yield "confusion-matrix", confusion_matrix(dataset.test_labels, predictions, f"{run}\n{score}")

    for name, chosen in (("right", np.flatnonzero(right)[:9]), ("wrong", np.flatnonzero(~right)[:9])):
        captions = [
            f"predicted {CLASS_NAMES[predictions[row]]}\ntrue {CLASS_NAMES[dataset.test_labels[row]]}"
            for row in chosen
        ]
        title = f"{run}\nthe first {len(chosen)} {name} test images"
        yield name, image_grid(dataset.test_images[chosen], captions, title, columns=3, inches=1.7)

    images = input_pipeline.normalize(pixels.reshape(1, 784), description["normalization"])
    for layer, maps in activations.of_convolutions(model, images).items():
        shape = " x ".join(map(str, maps.shape[1:]))
        yield f"activations-{layer}", activation_maps(pixels, maps[0], f"{run}\n{layer} ({shape}) of {what}")


def of_data(dataset: datasets.Dataset) -> Iterator[tuple[str, Figure]]:
    """Draws the train images: yields names, without ending, and figures."""
    images, labels = dataset.train_images, dataset.train_labels
    names = [CLASS_NAMES[label] for label in labels[:225]]
    yield "first-9", image_grid(images[:9], names[:9], "the first nine train images", columns=3, inches=1.7)
    yield "first-225", image_grid(images[:225], names, "the first 225 train images", columns=15, inches=0.9)

    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    means = np.stack([images[labels == label].mean(axis=0) for label in range(len(CLASS_NAMES))])
    captions = [f"{name}\n{count:,} images" for name, count in zip(CLASS_NAMES, counts, strict=True)]
    yield "class-means", image_grid(means, captions, "the mean train image of each class", columns=5, inches=1.4)


def read_run(workdir: Path) -> tuple[results.RunRecord, datasets.Dataset]:
    """The record of a completed run and the data it was made on.

    Raises:
        UserError: If there is no completed run, or other data.
    """
    if not (workdir / "record.json").exists():
        raise UserError(f"{workdir} holds no record; name the work directory of a completed run.")
    record = results.read(workdir / "record.json")
    if record.status != "completed":
        raise UserError(f"{workdir} holds a run that is {record.status}; complete it first.")
    dataset = datasets.load(record.config["data"]["source"], record.config["data"]["dir"])
    if dataset.sha256 != record.data_sha256:
        raise UserError(f"{workdir} holds a run on data of version {record.data_version}, not {dataset.version}.")
    return record, dataset


def _choose_image(dataset: datasets.Dataset, image: str) -> tuple[np.ndarray, str]:
    """Grey levels, uint8 (28, 28), of a test image by its number or of a file, and what to call it."""
    if not image.isdecimal():
        return photos.read_image(Path(image)), Path(image).name
    index, number = int(image), len(dataset.test_labels)
    if index >= number:
        raise UserError(f"--image={image}: the test set has {number:,} images, numbered from 0.")
    return dataset.test_images[index], f"test image {index}, {CLASS_NAMES[dataset.test_labels[index]]}"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG of 150 dots per inch or as SVG, by the path's ending; the same bytes every time.

    Raises:
        UserError: If it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "fmbench"}), results.atomic_file(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150, metadata={"Date": None})
    except OSError as error:
        raise UserError(f"{path}: cannot write the figure ({error.strerror}); name another directory.") from error


def titled(title: str, width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches below its title, whose lines are wrapped at the width."""
    characters = int(9 * width)  # of 12 points
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, characters)]
    figure = Figure(figsize=(width, height + 0.25 * (len(lines) + 1)), layout="constrained")
    figure.suptitle("\n".join(lines), parse_math=False)  # a file may be called $.png
    return figure


def learning_curves(
    histories: Sequence[Sequence[results.Epoch]], title: str, stage_ends: Sequence[int] = ()
) -> Figure:
    """Loss above, accuracy below, over epochs: train blue, held-out orange, all runs in the same axes.

    Args:
        histories: One run's epochs each. Held-out is validation or, where the run watched that, test.
        title: Above the figure.
        stage_ends: Epochs after which another stage began, marked by vertical lines.
    """
    figure = titled(title, 7, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    watched = "test" if any(epoch.test_loss is not None for epoch in itertools.chain(*histories)) else "validation"
    for history in histories:
        epochs = [epoch.epoch for epoch in history]
        held_out = [
            (epoch.test_loss, epoch.test_accuracy) if watched == "test" else (epoch.val_loss, epoch.val_accuracy)
            for epoch in history
        ]
        curves = [
            (upper, TRAIN, [epoch.train_loss for epoch in history]),
            (lower, TRAIN, [epoch.train_accuracy * 100 for epoch in history]),
            (upper, HELD_OUT, [math.nan if loss is None else loss for loss, _ in held_out]),
            (lower, HELD_OUT, [math.nan if accuracy is None else accuracy * 100 for _, accuracy in held_out]),
        ]
        for axes, colour, values in curves:
            if not np.isnan(values).all():
                # A marker, because a line through a single epoch is invisible.
                axes.plot(epochs, values, color=colour, marker="o", markersize=2.5, linewidth=1.2, alpha=0.8)
    for axes, quantity in ((upper, "loss (cross-entropy)"), (lower, "accuracy (%)")):
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        for epoch in stage_ends:
            axes.axvline(epoch, color="grey", linestyle="--", linewidth=1)
    lower.set_xlabel("epoch" + (" (dashed: a stage ends)" if stage_ends else ""))
    lower.set_xlim(0.5, max((len(history) for history in histories), default=1) + 0.5)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    # One entry each, however many runs there are.
    entries = {line.get_color(): line for line in upper.lines if line.get_color() in (TRAIN, HELD_OUT)}
    names = {TRAIN: "train", HELD_OUT: f"held out ({watched})"}
    figure.legend(
        entries.values(),
        [names[colour] for colour in entries],
        loc="outside lower center",
        ncols=len(entries) or 1,
    )
    return figure


def box_plot(scores: Mapping[str, Sequence[float]], title: str) -> Figure:
    """A box with whiskers for each name's scores, and the single scores as dots.

    Args:
        scores: Accuracies in [0, 1] by name; drawn in percent.
        title: Above the figure.
    """
    names = [f"{textwrap.fill(name, 30)}\nn = {len(values)}" for name, values in scores.items()]
    text_lines = sum(name.count("\n") + 2 for name in names)
    figure = titled(title, 8, 0.8 + 0.2 * text_lines)
    axes = figure.subplots()
    percents = [np.asarray(values) * 100 for values in scores.values()]
    axes.boxplot(
        percents,
        orientation="horizontal",
        tick_labels=names,
        widths=0.5,
        showfliers=False,  # all scores are drawn below
        medianprops={"color": "black"},
    )
    for position, values in enumerate(percents, start=1):
        axes.plot(values, np.full(len(values), position), "o", color=HELD_OUT, markersize=5, alpha=0.6)
    axes.invert_yaxis()  # the first name on top
    axes.set_xlabel("accuracy (%)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, title: str) -> Figure:
    """How often each true class (row) was predicted as each class (column); colours are fractions of the row.

    Args:
        labels: True classes, integers (n,).
        predictions: Predicted classes, integers (n,).
        title: Above the figure.
    """
    from sklearn import metrics  # takes a second to import

    counts = metrics.confusion_matrix(labels, predictions, labels=range(len(CLASS_NAMES)))
    # A class without images has a row of zeros, not of 0 / 0.
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = titled(title, 8.5, 7)
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the true class")
    for row, column in np.ndindex(counts.shape):
        colour = "white" if fractions[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def image_grid(images: np.ndarray, captions: Sequence[str], title: str, *, columns: int, inches: float) -> Figure:
    """Images row by row, each with its caption above.

    Args:
        images: Grey levels from 0 to 255, (n, 28, 28); n may be less than fills the rows.
        captions: One for each image, of as many lines as the others.
        title: Above the figure.
        columns: Images in a row.
        inches: Width of an image.
    """
    font_size = 72 * inches / 11.5  # so that eleven characters, 'T-shirt/top', are as wide as an image
    caption_lines = captions[0].count("\n") + 1 if len(captions) else 1
    cell_height = inches + caption_lines * 1.3 * font_size / 72 + 0.08
    rows = max(1, math.ceil(len(images) / columns))
    figure = titled(title, columns * inches * 1.15, rows * cell_height)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0, "hspace": 0})
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=font_size, pad=0.4 * font_size)
    return figure


def activation_maps(image: np.ndarray, maps: np.ndarray, title: str) -> Figure:
    """An image beside what a convolution made of it, a picture for each channel, all on one scale of colours.

    Args:
        image: Grey levels from 0 to 255, (28, 28).
        maps: (height, width, channels), of which the first 64 are drawn.
        title: Above the figure.
    """
    channels = maps.shape[2]
    shown = min(channels, MOST_MAPS)
    rows = math.ceil(shown / MAPS_PER_ROW)
    figure = titled(title, 9.5, 0.7 + 0.85 * rows)
    left, right = figure.subplots(1, 2, width_ratios=[1, 5])
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    left.set_title("image", fontsize=9)
    drawn = right.imshow(_mosaic(maps[:, :, :shown]), cmap="viridis")
    right.set_title(f"maps 1 to {shown} of {channels}, row by row", fontsize=9)
    figure.colorbar(drawn, ax=right, label="activation")
    left.set_axis_off()
    right.set_axis_off()
    return figure


def _mosaic(maps: np.ndarray) -> np.ndarray:
    """(height, width, channels) -> one picture, eight maps a row, with NaN, which is drawn as nothing, between."""
    height, width, channels = maps.shape
    gap = max(1, width // 14)
    rows = math.ceil(channels / MAPS_PER_ROW)
    picture = np.full((rows * (height + gap) - gap, MAPS_PER_ROW * (width + gap) - gap), np.nan)
    for channel in range(channels):
        row, column = divmod(channel, MAPS_PER_ROW)
        top, left = row * (height + gap), column * (width + gap)
        picture[top : top + height, left : left + width] = maps[:, :, channel]
    return picture


if __name__ == "__main__":
    main()
