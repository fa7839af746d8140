"""Classifies images with an exported model.

    python -m fmbench.predict --model=workdirs/mlp-cpu-float32-seed0 shirt.png boots.jpg
    python -m fmbench.predict --model=workdirs/mlp-cpu-float32-seed0 --figure=prediction.png photos/
    python -m fmbench.predict --model=workdirs/mlp-cpu-float32-seed0 --json - < shirt.png

An image may have up to 536 million pixels and any common format; a directory stands for all image files in it,
and - for the image on standard input. The models know one light article on a black background: an image of 28 x 28
is inverted if its border is light; any other is taken for a photograph of one article on a plain ground, and
trimmed, fitted in and turned into light on black as the data were made. --figure shows what came of it.

Probabilities are those at the temperature that the run fitted on its validation images. Of an image that is unlike
any article (nearly empty, of one grey, noise, or farther from the data than 99 % of them) the line says so. A run
without validation images has no temperature: its probabilities are the net's own.

Exit codes: 0 done, 1 an image could not be read (the others are classified), 2 something given cannot be used.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from fmbench.data import likeness, photos
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.system import command_line, runtime
from fmbench.training import inference

if TYPE_CHECKING:
    from matplotlib.figure import Figure
MOST_DRAWN = 30  # rows of a figure


@command_line.plain_errors("predict")
def main() -> None:
    parser = command_line.Parser("predict", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="work directory or exported model")
    parser.add_argument(
        "--invert",
        choices=["auto", "yes", "no"],
        default="auto",
        help="turn dark into light; auto: where the article is darker than its ground (default)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw each image, as the model sees it, beside its ten probabilities; FILE ends in .png or .svg",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="image", help="file, directory, or - for stdin")
    arguments = parser.parse_args()
    runtime.set_up()
    sys.exit(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.figure:
        with command_line.needs_extra("figures"):
            from fmbench.pages import drawing
    if arguments.figure and arguments.figure.suffix not in (".png", ".svg"):
        raise UserError(f"--figure={arguments.figure}: its name must end in .png or .svg.")
    files, left_out = [], []
    for path in arguments.images:
        found, others = photos.image_files(path) if path.is_dir() else ([path], [])
        files += found
        left_out += others
    if arguments.figure and len(files) > MOST_DRAWN:
        raise UserError(
            f"--figure draws {MOST_DRAWN} images at the most, not {len(files):,}; give fewer at a time."
        )
    model, description = exported.load_model(arguments.model)

    if left_out:
        first = ", ".join(photos.printable(path) for path in left_out[:3])
        more = f" and {len(left_out) - 3:,} more" if left_out[3:] else ""
        advice = "such images cannot be read; make PNG or JPEG files of them."
        print(f"fmbench.predict: left out {first}{more}: {advice}", file=sys.stderr)
    paths, images = [], []
    for path in tqdm(files, desc="reading", unit="image", leave=False, disable=None):
        try:
            images.append(photos.read_image(path, arguments.invert))
            paths.append(path)
        except UserError as error:
            tqdm.write(f"fmbench.predict: {error}", file=sys.stderr)
    if not images:
        return 1

    starts = tqdm(
        range(0, len(images), inference.BATCH_SIZE), desc="classifying", unit="batch", leave=False, disable=None
    )
    probabilities = np.concatenate(
        [
            inference.classify(model, description, np.stack(images[start : start + inference.BATCH_SIZE]))
            for start in starts
        ]
    )
    names = []
    for path, image, row in zip(paths, images, probabilities, strict=True):
        prediction = describe(row, description["class_names"])
        unlike = likeness.unlike(image, description["class_names"])
        doubt = f"; but it is unlike the data: {unlike}" if unlike else ""
        names.append(photos.printable(path.name) + doubt)
        if arguments.json:
            print(json.dumps({"path": str(path)} | prediction | {"unlike_data": unlike or None}))
        else:
            top3 = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction["top3"])
            print(f"{photos.printable(path)}: label {prediction['label']}, {top3}{doubt}")
    if arguments.figure:
        drawing.save(draw(names, images, probabilities, description["class_names"]), arguments.figure)
    return 0 if len(images) == len(files) and not left_out else 1


def describe(probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """One image's label, class, probability and three likeliest classes, from its probabilities (10,)."""
    ranking = [int(label) for label in np.argsort(-probabilities, stable=True)]
    return {
        "label": ranking[0],
        "class": class_names[ranking[0]],
        "probability": float(probabilities[ranking[0]]),
        "top3": [(class_names[label], float(probabilities[label])) for label in ranking[:3]],
    }


def draw(
    names: Sequence[str], images: Sequence[np.ndarray], probabilities: np.ndarray, class_names: Sequence[str]
) -> "Figure":
    """A row for each image: the image beside a bar for each class.

    Args:
        names: What to write above the images.
        images: uint8 (28, 28) each.
        probabilities: (n, 10).
        class_names: Ten.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 2.4 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 2, squeeze=False, width_ratios=[1, 2])
    for (left, right), name, image, row in zip(grid, names, images, probabilities, strict=True):
        left.imshow(image, cmap="gray", vmin=0, vmax=255)
        left.set_axis_off()
        left.set_title(textwrap.fill(name, 28), fontsize=9, parse_math=False)
        bars = right.barh(class_names, row)
        right.bar_label(bars, fmt="{:.1%}", padding=2, fontsize=7)
        right.invert_yaxis()  # class 0 on top
        right.set_xlim(0, 1)
        right.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        right.tick_params(labelsize=8)
        right.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
