"""The pictures of runs and data; each function returns a figure."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fmbench.errors import UserError
from fmbench.models import confidence
from fmbench.records import schema, statistics
from fmbench.system import files

TRAIN, HELD_OUT = "tab:blue", "tab:orange"
ENDINGS = (".svg", ".png", ".pdf")
COLUMN = 3.35  # inches: a column of most papers
# Of Okabe and Ito, from dark to light, so that lines differ in grey, too; and their dashes and markers.
LINES = (
    ("#000000", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#009e73", ":", "D"),
    ("#e69f00", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#56b4e9", (0, (1, 3)), "x"),
)
WATCHED = {"val": "validation", "test": "test", "": "not watched"}
# Of Okabe and Ito, which the colour-blind can tell apart; the first two are not those of a single run's curves.
RUNS = ("#009e73", "#cc79a7", "#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#999999")
MARKERS = ("o", "s", "^", "D")  # where there are more runs than colours
LEAST_FOR_A_BOX = 10  # scores; fewer have no quartiles to speak of
MOST_MAPS, MAPS_PER_ROW = 64, 8


def check_ending(flag: str, path: Path) -> None:
    """Refuses a file whose ending `save` does not know.

    Raises:
        UserError: Names the flag and the endings.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"{flag}={path}: expected a file that ends in {', '.join(ENDINGS)}.")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG (150 dots per inch), SVG or PDF, by the path's ending; the same bytes every time.

    Raises:
        UserError: If it cannot be written there.
    """
    undated = {"CreationDate": None} if path.suffix == ".pdf" else {"Date": None}
    fonts: dict[Any, Any] = {"svg.hashsalt": "fmbench", "pdf.fonttype": 42}  # TrueType, which publishers ask for
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(fonts), files.atomic_file(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix("."), dpi=150, metadata=undated)
    except OSError as error:
        raise UserError(f"{path}: cannot write the figure ({error.strerror}); name another directory.") from error


def titled(title: str, width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches below its title, whose lines are wrapped at the width."""
    characters = int(9 * width)  # of 12 points
    lines = [
        part for line in title.splitlines() for part in textwrap.wrap(line, characters, break_on_hyphens=False)
    ]
    figure = Figure(figsize=(width, height + 0.25 * (len(lines) + 1)), layout="constrained")
    figure.suptitle("\n".join(lines), parse_math=False)  # a file may be called $.png
    return figure


def in_words(entry: str) -> str:
    """An entry for a title: 'cnn1 with num_epochs=10, optimizer.learning_rate=0.1'."""
    return entry.replace("+", " with ", 1).replace("+", ", ")


def learning_curves(
    histories: Sequence[Sequence[schema.Epoch]],
    title: str,
    stage_ends: Sequence[int] = (),
    names: Sequence[str] = (),
) -> Figure:
    """Loss above, accuracy below, over epochs, all runs in the same axes; bars, if no run has a second epoch.

    A single run's train curve is blue and its held-out one orange. Of several, each run has a colour, and train is
    dashed.

    Args:
        histories: One run's epochs each. Held-out is validation or, where the run watched that, test.
        title: Above the figure.
        stage_ends: Epochs after which another stage began, marked by vertical lines.
        names: What the runs are called, if they are several; run 1, run 2, ... if nothing is said.
    """
    watched = "test" if any(epoch.test_loss is not None for epoch in itertools.chain(*histories)) else "val"
    splits = {"train": "train", watched: "held out (test)" if watched == "test" else "held out (validation)"}
    names = names or [f"run {number}" for number in range(1, len(histories) + 1)]
    figure = titled(title, 7, 6)
    draw = _curves if any(len(history) > 1 for history in histories) else _bars
    for axes, quantity in zip(figure.subplots(2, 1, sharex=True), ("loss", "accuracy"), strict=True):
        values = [{split: _values(history, f"{split}_{quantity}") for split in splits} for history in histories]
        draw(axes, values, splits, names)
        axes.set_ylabel("loss (cross-entropy)" if quantity == "loss" else "accuracy (%)")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        for epoch in stage_ends if draw is _curves else ():
            axes.axvline(epoch, color="grey", linestyle="--", linewidth=1)
    if draw is _curves:
        axes.set_xlabel("epoch" + (" (dashed grey: a stage ends)" if stage_ends else ""))
        axes.set_xlim(0.5, max(map(len, histories)) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        entries = _legend(axes)
        figure.legend(*entries, loc="outside lower center", ncols=min(len(entries[0]), 4))
    else:
        several = f", a bar each for {names[0]} to {names[-1]}" if len(histories) > 1 else ""
        axes.set_xlabel(f"after the only epoch{several}")
    return figure


def overlaid_curves(entries: Mapping[str, Sequence[Sequence[schema.Epoch]]]) -> Figure:
    """Training loss, and below it watched accuracy, of several entries, as wide as a column of a paper.

    A line is the mean over seeds, the band around it one sample standard deviation.

    Args:
        entries: The histories of an entry's seeds, by its name, at most six; more repeat the lines.
    """
    watched = {name: _watched(histories) for name, histories in entries.items()}
    splits = sorted(set(watched.values()) - {""})
    longest = max(len(history) for histories in entries.values() for history in histories)
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8}):
        num_panels = 2 if splits else 1
        size = (COLUMN, 0.62 * COLUMN * num_panels + 0.16 * len(entries))
        figure = Figure(figsize=size, layout="constrained")
        upper, *lower = panels = figure.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0]
        for (name, histories), style in zip(entries.items(), itertools.cycle(LINES), strict=False):
            split = f", {WATCHED[watched[name]]}" if len({*watched.values()}) > 1 else ""
            seeds = f"(n = {len(histories)}{split})".replace(" ", "\N{NO-BREAK SPACE}")
            label = textwrap.fill(f"{name} {seeds}", 42, break_on_hyphens=False)
            quantities = (("train_loss", 1), (f"{watched[name]}_accuracy", 100))
            for axes, (field, scale) in zip(panels, quantities, strict=False):
                _draw_over_seeds(axes, histories, field, scale, label, style)
        upper.set_title("Training loss")
        upper.set_ylabel("cross-entropy")
        for axes in lower:
            axes.set_title(f"Accuracy on the {' or '.join(WATCHED[split] for split in splits)} set")
            axes.set_ylabel("accuracy (%)")
        for axes in panels:
            axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, longest + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        handles, names = upper.get_legend_handles_labels()
        legend = figure.legend(
            handles, names, loc="outside lower center", fontsize=7, frameon=False, handlelength=4
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_over_seeds(
    axes: Axes,
    histories: Sequence[Sequence[schema.Epoch]],
    field: str,
    scale: float,
    label: str,
    style: tuple[str, Any, str],
) -> None:
    epochs, mean, std = _over_seeds(histories, field)
    if not len(epochs):
        return
    colour, dashes, marker = style
    axes.plot(
        epochs,
        scale * mean,
        label=label,
        color=colour,
        linestyle=dashes,
        linewidth=1.1,
        marker=marker,
        markersize=3,
        markevery=max(1, len(epochs) // 8),
    )
    axes.fill_between(epochs, scale * (mean - std), scale * (mean + std), color=colour, alpha=0.15, linewidth=0)


def _watched(histories: Sequence[Sequence[schema.Epoch]]) -> str:
    """'val', 'test', or '' where none was watched."""
    epochs = list(itertools.chain(*histories))
    if any(epoch.val_accuracy is not None for epoch in epochs):
        return "val"
    return "test" if any(epoch.test_accuracy is not None for epoch in epochs) else ""


def _over_seeds(
    histories: Sequence[Sequence[schema.Epoch]], field: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, and over the seeds that have an epoch the mean and the sample standard deviation of a field."""
    by_epoch: dict[int, list[float]] = {}
    for epoch in itertools.chain(*histories):
        if (value := getattr(epoch, field, None)) is not None:
            by_epoch.setdefault(epoch.epoch, []).append(value)
    numbers = sorted(by_epoch)
    pairs = [statistics.mean_and_std(by_epoch[number]) for number in numbers]
    return np.array(numbers), np.array([mean for mean, _ in pairs]), np.array([std or 0.0 for _, std in pairs])


def _values(history: Sequence[schema.Epoch], field: str) -> np.ndarray:
    """A curve, NaN where nothing was watched; accuracies in percent."""
    values = [getattr(epoch, field) for epoch in history]
    scale = 100 if field.endswith("accuracy") else 1
    return np.array([math.nan if value is None else scale * value for value in values])


def _curves(
    axes: Axes, values: Sequence[Mapping[str, np.ndarray]], splits: Mapping[str, str], names: Sequence[str]
) -> None:
    several = len(values) > 1
    for number, of_run in enumerate(values):
        for split, curve in of_run.items():
            if np.isnan(curve).all():
                continue
            is_train = split == "train"
            axes.plot(
                np.arange(1, len(curve) + 1),
                curve,
                color=RUNS[number % len(RUNS)] if several else TRAIN if is_train else HELD_OUT,
                linestyle="--" if several and is_train else "-",
                marker=MARKERS[number // len(RUNS) % len(MARKERS)],
                markersize=2.5,
                linewidth=0.9 if several and is_train else 1.4,
                label=f"{names[number]}, {splits[split]}" if several else splits[split],
            )


def _legend(axes: Axes) -> tuple[list[Line2D], list[str]]:
    """Of several runs one entry for each, by its held-out curve if it has one, and one for the dashes."""
    curves = {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    if any(line.get_linestyle() == "--" for line in curves.values()):
        by_run = {label.partition(", ")[0]: line for label, line in curves.items()}
        held_out = {label.partition(", ")[2] for label in curves} - {"train"}
        dashed = Line2D([], [], color="grey", linestyle="--")
        solid = {name: Line2D([], [], color="grey") for name in held_out}
        curves = by_run | {"train": dashed} | solid
    return list(curves.values()), list(curves)


def _bars(
    axes: Axes, values: Sequence[Mapping[str, np.ndarray]], splits: Mapping[str, str], names: Sequence[str]
) -> None:
    """A curve through one epoch would be a dot: bars from zero, with their numbers."""
    known = [split for split in splits if any(not np.isnan(of_run[split]).all() for of_run in values)]
    width = 0.7 / max(1, len(values))
    for place, split in enumerate(known):
        for number, of_run in enumerate(values):
            x = place + (number - (len(values) - 1) / 2) * width
            bar = axes.bar(x, of_run[split], 0.9 * width, color=TRAIN if split == "train" else HELD_OUT)
            axes.bar_label(bar, fmt="%.3g" if len(values) > 4 else "%.4g", fontsize=9 if len(values) < 5 else 7)
    axes.set_xticks(range(len(known)), [splits[split] for split in known])
    axes.set_xlim(-0.6, max(1, len(known)) - 0.4)
    axes.margins(y=0.15)


def box_plot(scores: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Each name's scores as points with their mean; from ten scores on with a box and whiskers, too.

    Args:
        scores: Accuracies in [0, 1] by name, whose lines stay as they are; drawn in percent.
        title: Above the figure.
    """
    names = [f"{name}\nn = {len(values)}" for name, values in scores.items()]
    text_lines = sum(name.count("\n") + 2 for name in names)
    figure = titled(title, 8, 0.8 + 0.2 * text_lines)
    axes = figure.subplots()
    for position, values in enumerate(scores.values(), start=1):
        percents = np.asarray(values) * 100
        if len(values) >= LEAST_FOR_A_BOX:
            axes.boxplot(
                [percents],
                positions=[position],
                orientation="horizontal",
                widths=0.5,
                showfliers=False,  # all scores are drawn below
                medianprops={"color": "grey"},
            )
        axes.plot(percents, np.full(len(values), position), "o", color=HELD_OUT, markersize=6, alpha=0.6)
        mean = percents.mean() if len(values) else math.nan
        axes.plot(mean, position, "|", color=matplotlib.rcParams["text.color"], markersize=18, markeredgewidth=1.5)
    axes.set_yticks(range(1, len(names) + 1), names, parse_math=False)
    axes.set_ylim(len(names) + 0.5, 0.5)  # the first name on top
    axes.set_xlabel("accuracy (%); the stroke is the mean")
    axes.grid(axis="x", alpha=0.3)
    return figure


def confusion_matrix(
    labels: np.ndarray, predictions: np.ndarray, title: str, class_names: Sequence[str]
) -> Figure:
    """How often each true class (row) was predicted as each class (column); colours are fractions of the row.

    Args:
        labels: True classes, integers (n,).
        predictions: Predicted classes, integers (n,).
        title: Above the figure.
        class_names: In the order of the classes.
    """
    from sklearn import metrics  # takes a second to import

    counts = metrics.confusion_matrix(labels, predictions, labels=range(len(class_names)))
    # A class without images has a row of zeros, not of 0 / 0.
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = titled(title, 8.5, 7)
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the true class")
    for row, column in np.ndindex(counts.shape):
        colour = "white" if fractions[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(class_names)), class_names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def reliability_diagram(bins: Mapping[float, confidence.Bins], title: str) -> Figure:
    """Accuracy over the probability of the predicted class, a panel for each temperature, below how many images.

    Args:
        bins: The test images' by temperature; 1 is the net's own.
        title: Above the figure.
    """
    figure = titled(title, 4.2 * len(bins), 5)
    grid = figure.subplots(2, len(bins), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    edges = np.linspace(0, 1, confidence.NUM_BINS + 1)
    for (upper, lower), (temperature, found) in zip(grid.T, bins.items(), strict=True):
        width = edges[1] - edges[0]
        upper.bar(edges[:-1], found.accuracy * 100, width, align="edge", color=TRAIN, edgecolor="white")
        upper.plot(found.confidence, found.accuracy * 100, "o", color=HELD_OUT, markersize=4)
        upper.plot([0, 1], [0, 100], color="grey", linestyle="--", linewidth=1)
        name = "as the net gives them" if temperature == 1 else f"at the temperature {temperature:.2f}"
        upper.set_title(f"{name}\nexpected calibration error {found.calibration_error:.2%}", fontsize=10)
        upper.set_ylim(0, 100)
        lower.bar(edges[:-1], found.counts, width, align="edge", color=TRAIN, edgecolor="white")
        lower.set_xlabel("probability of the predicted class")
        lower.set_xlim(0, 1)
    grid[0, 0].set_ylabel("accuracy (%)")
    grid[1, 0].set_ylabel("test images")
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
        axes.set_title(caption, fontsize=font_size, pad=0.4 * font_size, parse_math=False)
    return figure


def activation_maps(image: np.ndarray, maps: np.ndarray, title: str) -> Figure:
    """An image beside what a convolution made of it, a picture for each channel, all on one scale.

    The colours are white at 0, so that what a map adds and what it takes away are told apart.

    Args:
        image: Grey levels from 0 to 255, (28, 28).
        maps: (height, width, channels), of which the first 64 are drawn.
        title: Above the figure.
    """
    channels = maps.shape[2]
    shown = min(channels, MOST_MAPS)
    rows = math.ceil(shown / MAPS_PER_ROW)
    columns = min(shown, MAPS_PER_ROW)
    figure = titled(title, 4.5 + 0.625 * columns, 0.7 + 0.85 * rows)
    left, right = figure.subplots(1, 2, width_ratios=[1, 5 * columns / MAPS_PER_ROW])
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    left.set_title("image", fontsize=9)
    most = float(np.abs(maps[:, :, :shown]).max()) or 1.0
    drawn = right.imshow(_mosaic(maps[:, :, :shown]), cmap="RdBu_r", vmin=-most, vmax=most)
    right.set_title(f"maps 1 to {shown} of {channels}, row by row", fontsize=9)
    figure.colorbar(drawn, ax=right, label="activation")
    left.set_axis_off()
    right.set_axis_off()
    return figure


def _mosaic(maps: np.ndarray) -> np.ndarray:
    """(height, width, channels) -> one picture, at most eight maps a row, with NaN, drawn as nothing, between."""
    height, width, channels = maps.shape
    gap = max(1, width // 14)
    rows, columns = math.ceil(channels / MAPS_PER_ROW), min(channels, MAPS_PER_ROW)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for channel in range(channels):
        row, column = divmod(channel, MAPS_PER_ROW)
        top, left = row * (height + gap), column * (width + gap)
        picture[top : top + height, left : left + width] = maps[:, :, channel]
    return picture
