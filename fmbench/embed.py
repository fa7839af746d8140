"""Lays images out in the plane so that similar ones lie together: t-SNE of their pixels or of a model's features.

    python -m fmbench.embed
    python -m fmbench.embed --model=workdirs/cnn3-cpu-float32-seed0 --layer=dense1 --num_images=2000 --projector
    tensorboard --logdir=figures/embedding/projector/cnn3-cpu-float32-seed0-dense1

A layer's features are what it returns, as a rule before the model's activation function; without --layer they are
what the last dense layer, `head`, is given.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import matplotlib
import numpy as np
import PIL.Image
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

from fmbench import activations, checkpoint, datasets, features, figures, input_pipeline, results, runtime
from fmbench.datasets import CLASS_NAMES
from fmbench.errors import UserError

FEWEST_IMAGES = 10  # of which neighbours can be spoken
BATCH_SIZE = 250  # small, because the results of all layers are held at once
THUMBNAIL_SIDE = 0.045  # as a fraction of the figure's axes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmbench.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="work directory of a completed run (default: raw pixels)")
    parser.add_argument("--layer", help="whose features, as in dense1 (default: those that head is given)")
    parser.add_argument("--split", choices=["train", "test"], default="test")
    parser.add_argument("--num_images", type=int, default=1000, help="the first of the split (default: 1000)")
    parser.add_argument("--output", type=Path, default=Path("figures/embedding"), help="default: %(default)s")
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    parser.add_argument(
        "--projector",
        action="store_true",
        help="also write <output>/projector for TensorBoard's Embedding Projector",
    )
    arguments = parser.parse_args()
    if arguments.layer and not arguments.model:
        parser.error("--layer needs --model, the run whose layer it is")
    runtime.set_up()
    try:
        _run(arguments)
    except UserError as error:
        print(f"fmbench.embed: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.model:
        record, dataset = figures.read_run(arguments.model)
        images, labels = first_images(dataset, arguments.split, arguments.num_images)
        model, description = checkpoint.load_model(arguments.model)
        inputs = images
        if description["normalization"] == "none":  # the model is one on a backbone's features
            inputs = backbone_features(dataset, arguments.split, description["features"])[: len(images)]
        vectors = layer_features(model, inputs, description["normalization"], arguments.layer)
        name = f"{record.name}-{arguments.layer or 'features'}"
    else:
        images, labels = first_images(datasets.load(), arguments.split, arguments.num_images)
        vectors = images.reshape(len(images), -1) / np.float32(255)
        name = "pixels"

    begin = time.perf_counter()
    positions = t_sne(vectors)
    seconds = time.perf_counter() - begin
    title = f"t-SNE of {len(images):,} {arguments.split} images in {seconds:.1f} s\n{name}"
    path = arguments.output / f"tsne-{name}.{arguments.format}"
    figures.save(draw(positions, labels, images, title), path)
    print(path)
    if arguments.projector:
        directory = arguments.output / "projector" / name
        write_projector(directory, vectors, labels, images)
        print(f"{directory}: tensorboard --logdir={directory} shows it")


def first_images(dataset: datasets.Dataset, split: str, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of the split, uint8 (num_images, 28, 28), and their labels.

    Raises:
        UserError: If there are not so many, or too few are asked for.
    """
    images, labels = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }[split]
    if not FEWEST_IMAGES <= num_images <= len(images):
        raise UserError(
            f"--num_images={num_images}: it must be from {FEWEST_IMAGES} to {len(images):,}, "
            f"the size of the {split} set."
        )
    return images[:num_images], labels[:num_images]


def backbone_features(dataset: datasets.Dataset, split: str, spec: dict[str, Any]) -> np.ndarray:
    """The features of a split on which a run was trained, (n, num_features), as a rule from the cache."""
    images, part = {
        "train": (dataset.train_images, "train-images"),
        "test": (dataset.test_images, "t10k-images"),
    }[split]
    return features.load(images, dataset.sha256[part], features.Spec(**spec))


def layer_features(model: nnx.Module, inputs: np.ndarray, normalization: str, layer: str | None) -> np.ndarray:
    """What a layer of a model returns.

    Args:
        model: As `fmbench.checkpoint.load_model` returns it.
        inputs: uint8 (n, 28, 28), or (n, num_features) if the model is one on features.
        normalization: That of the model's description.
        layer: A path, as in 'dense1' or 'blocks.0.conv1'; None stands for what `head` is given.

    Returns:
        float32 (n, size of the layer).

    Raises:
        UserError: If the model has no such layer; lists those it has.
    """
    if layer is None:
        layer, copy = "head", cast(Any, nnx.clone(model))
        copy.head = _Identity()  # what it returns is what it is given
        model = copy
    parts = []
    for start in tqdm(range(0, len(inputs), BATCH_SIZE), desc="features", unit="batch", disable=None):
        batch = input_pipeline.normalize(inputs[start : start + BATCH_SIZE], normalization)
        outputs = activations.of_layers(model, batch)
        if layer not in outputs:
            raise UserError(f"--layer={layer}: the model has no such layer; it has {', '.join(outputs)}.")
        parts.append(outputs[layer].reshape(len(batch), -1))
    return np.concatenate(parts)


class _Identity(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def t_sne(vectors: np.ndarray) -> np.ndarray:
    """(n, size) -> (n, 2), the same every time.

    References:
        van der Maaten & Hinton, 2008, "Visualizing data using t-SNE"; Poličar et al., 2024, "openTSNE".
    """
    from openTSNE import TSNE  # takes seconds to import

    with tqdm(total=750, desc="t-SNE", unit="iteration", disable=None) as bar:  # openTSNE's 250 + 500

        def show(iteration: int, error: float, embedding: np.ndarray) -> None:
            bar.update(50)

        tsne = TSNE(
            perplexity=min(30, (len(vectors) - 1) / 3),
            initialization="pca",
            random_state=0,
            n_jobs=1,  # the sums of several threads differ in their last bits, and t-SNE magnifies that
            callbacks=show,
            callbacks_every_iters=50,
        )
        return np.asarray(tsne.fit(vectors))


def draw(positions: np.ndarray, labels: np.ndarray, images: np.ndarray, title: str) -> Figure:
    """Draws points in the colours of their classes, and thumbnails of some where these do not overlap.

    Args:
        positions: (n, 2), of any scale.
        labels: Classes, integers (n,).
        images: Grey levels from 0 to 255, (n, 28, 28).
        title: Above the figure.
    """
    # Both directions by the same factor: t-SNE is about distances.
    positions = (positions - positions.min(axis=0)) / np.ptp(positions, axis=0).max()
    width, height = positions.max(axis=0) + 2 * THUMBNAIL_SIDE
    figure = figures.titled(title, 8.5 * width + 1.7, 8.5 * height)  # 1.7 inches for the legend
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"](range(len(CLASS_NAMES)))
    for label, name in enumerate(CLASS_NAMES):
        x, y = positions[labels == label].T
        axes.scatter(x, y, s=14, color=colours[label], label=name)
    for index in apart(positions, THUMBNAIL_SIDE * 1.1):
        _draw_thumbnail(axes, images[index], positions[index], colours[labels[index]])
    edge = -THUMBNAIL_SIDE
    axes.set(xlim=(edge, edge + width), ylim=(edge, edge + height), aspect="equal", xticks=[], yticks=[])
    figure.legend(loc="outside right center", title="class", markerscale=2)
    return figure


def apart(positions: np.ndarray, distance: float) -> list[int]:
    """Indices of points of (n, 2), in their order, each at least `distance` across or down from all before it.

    Source: scikit-learn's example "Manifold learning on handwritten digits", with the distance of squares.
    """
    chosen: list[int] = []
    for index, position in enumerate(positions):
        if not chosen or np.abs(positions[chosen] - position).max(axis=1).min() >= distance:
            chosen.append(index)
    return chosen


def _draw_thumbnail(axes: Axes, image: np.ndarray, centre: np.ndarray, colour: Sequence[float]) -> None:
    left, bottom = centre - THUMBNAIL_SIDE / 2
    right, top = centre + THUMBNAIL_SIDE / 2
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, extent=(left, right, bottom, top), zorder=3)
    frame = Rectangle((left, bottom), THUMBNAIL_SIDE, THUMBNAIL_SIDE, fill=False, edgecolor=colour, zorder=4)
    axes.add_patch(frame)


def write_projector(directory: Path, vectors: np.ndarray, labels: np.ndarray, images: np.ndarray) -> None:
    """Writes what TensorBoard's Embedding Projector reads: vectors, metadata, thumbnails, and where they are.

    tensorboardX's `add_embedding` leaves the rest of the sprite uninitialised, and lists an embedding that is
    written again twice.

    Args:
        directory: Created if absent. TensorBoard finds the files only where this is its --logdir itself.
        vectors: float32 (n, size).
        labels: Classes, integers (n,).
        images: uint8 (n, 28, 28); drawn dark on white. All 60,000 fit into the 8,192 pixels a browser can show.

    Raises:
        UserError: If it cannot be written to.
    """
    rows = [f"{index}\t{CLASS_NAMES[label]}\n" for index, label in enumerate(labels)]
    config = (
        'embeddings {\n  tensor_name: "fmbench"\n  tensor_path: "vectors.tsv"\n  metadata_path: "metadata.tsv"\n'
        '  sprite {\n    image_path: "sprite.png"\n    single_image_dim: 28\n    single_image_dim: 28\n  }\n}\n'
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with results.atomic_file(directory / "vectors.tsv") as file:
            np.savetxt(file, vectors, fmt="%.7g", delimiter="\t")
        with results.atomic_file(directory / "metadata.tsv") as file:
            file.write("".join(["Index\tLabel\n", *rows]).encode())
        with results.atomic_file(directory / "sprite.png") as file:
            PIL.Image.fromarray(sprite(images)).save(file, "png")
        with results.atomic_file(directory / "projector_config.pbtxt") as file:
            file.write(config.encode())
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error.strerror}); name another --output.") from error


def sprite(images: np.ndarray) -> np.ndarray:
    """Inverted images, uint8 (n, 28, 28), row by row in a square of ceil(sqrt(n)) a side, filled up white."""
    side = math.ceil(math.sqrt(len(images)))
    cells = np.full((side * side, 28, 28), 255, np.uint8)
    cells[: len(images)] = 255 - images
    return cells.reshape(side, side, 28, 28).swapaxes(1, 2).reshape(side * 28, side * 28)


if __name__ == "__main__":
    main()
