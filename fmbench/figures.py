"""Draws what a completed run learnt and got wrong, and what the data look like.

    python -m fmbench.figures --model=workdirs/cnn3-cpu-float32-seed0
    python -m fmbench.figures --model=workdirs/cnn3-cpu-float32-seed0 --image=shirt.png --format=svg
    python -m fmbench.figures data --dark

Of a run: learning curves, the confusion matrix of the test set, how often the net is right when it is how sure (a
reliability diagram), nine right and nine wrong test images, and what every convolution returns for one image. Of
the data: the first nine train images, the first 225 with classes, and the mean image of every class.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from fmbench.data import fashion_mnist, features, photos
from fmbench.errors import UserError
from fmbench.models import activations, confidence, exported
from fmbench.records import store
from fmbench.system import command_line, runtime
from fmbench.training import inference, input_pipeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@command_line.plain_errors("figures")
def main() -> None:
    parser = command_line.Parser("figures", description=__doc__)
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
    parser.add_argument("--dark", action="store_true", help="light on black, for dark pages and slides")
    arguments = parser.parse_args()
    if (arguments.subject is None) == (arguments.model is None):
        parser.error("name a run, as in --model=workdirs/cnn3-cpu-float32-seed0, or say data")
    runtime.set_up()
    with command_line.needs_extra("figures"):
        from matplotlib import style

        from fmbench.pages import drawing
    if arguments.model:
        output = arguments.output or arguments.model / "figures"
        figures = of_run(arguments.model, arguments.image)
    else:
        output = arguments.output or Path("figures")
        figures = of_data(fashion_mnist.load())
    with style.context("dark_background" if arguments.dark else "default"):
        for name, figure in tqdm(figures, desc="drawing", unit="figure", disable=None):
            path = output / f"{name}.{arguments.format}"
            drawing.save(figure, path)
            tqdm.write(f"{path}")


def of_run(workdir: Path, image: str) -> Iterator[tuple[str, "Figure"]]:
    """Draws a completed run: yields names, without ending, and figures.

    Args:
        workdir: Its work directory.
        image: The number of a test image, or the path of any other.

    Raises:
        UserError: If there is no completed run, or no such image.
    """
    from fmbench.pages import drawing

    record, dataset = store.read_run(workdir)
    predictions = store.read_predictions(record, workdir / "record.npy")
    model, description = exported.load_model(workdir)
    class_names = dataset.class_names
    pixels, what = _choose_image(dataset, image)
    run = f"{drawing.in_words(record.entry)} (seed {record.seed}, {record.dtype})"

    stage_ends = list(itertools.accumulate(stage.num_epochs for stage in record.stages))[:-1]
    yield "learning-curves", drawing.learning_curves([record.history], f"Learning curves of {run}", stage_ends)

    right = predictions == dataset.test_labels
    score = f"{right.sum():,} of {len(right):,} test images right"
    title = f"What {run} takes the classes for\n{score}"
    yield (
        "confusion-matrix",
        drawing.confusion_matrix(dataset.test_labels, predictions, title, class_names),
    )

    inputs, spec = dataset.test_images, description.get("features", {})
    if spec.get("backbone"):  # the run left them in the cache
        inputs = features.load(inputs, dataset.sha256["t10k-images"], features.Spec(**spec))
    batches = np.array_split(inputs, max(1, len(inputs) // inference.BATCH_SIZE))
    logits = np.concatenate([inference.logits_of_inputs(model, description, batch) for batch in batches])
    temperatures = (1.0, description.get("temperature") or 1.0)
    bins = {t: confidence.bins(confidence.probabilities(logits, t), dataset.test_labels) for t in temperatures}
    yield "reliability", drawing.reliability_diagram(bins, run)

    for name, chosen in (("right", np.flatnonzero(right)[:9]), ("wrong", np.flatnonzero(~right)[:9])):
        captions = [
            f"predicted {class_names[predictions[row]]}\ntrue {class_names[dataset.test_labels[row]]}"
            for row in chosen
        ]
        title = f"The first {len(chosen)} test images that {run} gets {name}"
        yield name, drawing.image_grid(dataset.test_images[chosen], captions, title, columns=3, inches=1.7)

    images = input_pipeline.normalize(pixels.reshape(1, 784), description["normalization"])
    for layer, maps in activations.of_convolutions(model, images).items():
        shape = " x ".join(map(str, maps.shape[1:]))
        yield (
            f"activations-{layer}",
            drawing.activation_maps(pixels, maps[0], f"What {layer} ({shape}) of {run} makes of {what}"),
        )


def of_data(dataset: fashion_mnist.Dataset) -> Iterator[tuple[str, "Figure"]]:
    """Draws the train images: yields names, without ending, and figures."""
    from fmbench.pages import drawing

    images, labels, class_names = dataset.train_images, dataset.train_labels, dataset.class_names
    names = [class_names[label] for label in labels[:225]]
    yield (
        "first-9",
        drawing.image_grid(images[:9], names[:9], "The first nine train images", columns=3, inches=1.7),
    )
    yield (
        "first-225",
        drawing.image_grid(images[:225], names, "The first 225 train images", columns=15, inches=0.9),
    )

    counts = np.bincount(labels, minlength=len(class_names))
    means = np.stack([images[labels == label].mean(axis=0) for label in range(len(class_names))])
    captions = [f"{name}\n{count:,} images" for name, count in zip(class_names, counts, strict=True)]
    yield (
        "class-means",
        drawing.image_grid(means, captions, "The mean train image of each class", columns=5, inches=1.4),
    )


def _choose_image(dataset: fashion_mnist.Dataset, image: str) -> tuple[np.ndarray, str]:
    """Grey levels, uint8 (28, 28), of a test image by its number or of a file, and what to call it."""
    if not image.isdecimal():
        return photos.read_image(Path(image)), Path(image).name
    index, number = int(image), len(dataset.test_labels)
    if index >= number:
        raise UserError(f"--image={image}: the test set has {number:,} images, numbered from 0.")
    return dataset.test_images[index], f"test image {index}, {dataset.class_names[dataset.test_labels[index]]}"


if __name__ == "__main__":
    main()
