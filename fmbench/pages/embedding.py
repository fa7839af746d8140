"""Images in the plane, similar ones together: t-SNE, its picture, TensorBoard's Embedding Projector."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

from fmbench.errors import UserError
from fmbench.pages import drawing
from fmbench.system import command_line, files

THUMBNAIL_SIDE = 0.045  # as a fraction of the figure's axes


def t_sne(vectors: np.ndarray) -> np.ndarray:
    """(n, size) -> (n, 2), the same every time.

    Raises:
        UserError: If openTSNE is not installed.

    References:
        van der Maaten & Hinton, 2008, "Visualizing data using t-SNE"; Poličar et al., 2024, "openTSNE".
    """
    with command_line.needs_extra("figures"):
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


def draw(
    positions: np.ndarray, labels: np.ndarray, images: np.ndarray, title: str, class_names: Sequence[str]
) -> Figure:
    """Draws points in the colours of their classes, and thumbnails of some where these do not overlap.

    Args:
        positions: (n, 2), of any scale.
        labels: Classes, integers (n,).
        images: Grey levels from 0 to 255, (n, 28, 28).
        title: Above the figure.
        class_names: In the order of the classes.
    """
    # Both directions by the same factor: t-SNE is about distances.
    positions = (positions - positions.min(axis=0)) / np.ptp(positions, axis=0).max()
    width, height = positions.max(axis=0) + 2 * THUMBNAIL_SIDE
    figure = drawing.titled(title, 8.5 * width + 1.7, 8.5 * height)  # 1.7 inches for the legend
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"](range(len(class_names)))
    for label, name in enumerate(class_names):
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


def write_projector(
    directory: Path, vectors: np.ndarray, labels: np.ndarray, images: np.ndarray, class_names: Sequence[str]
) -> None:
    """Writes what TensorBoard's Embedding Projector reads: vectors, metadata, thumbnails, and where they are.

    tensorboardX's `add_embedding` leaves the rest of the sprite uninitialised, and lists an embedding that is
    written again twice.

    Args:
        directory: Created if absent. TensorBoard finds the files only where this is its --logdir itself.
        vectors: float32 (n, size).
        labels: Classes, integers (n,).
        images: uint8 (n, 28, 28); drawn dark on white. All 60,000 fit into the 8,192 pixels a browser can show.
        class_names: In the order of the classes.

    Raises:
        UserError: If it cannot be written to.
    """
    rows = [f"{index}\t{class_names[label]}\n" for index, label in enumerate(labels)]
    config = (
        'embeddings {\n  tensor_name: "fmbench"\n  tensor_path: "vectors.tsv"\n  metadata_path: "metadata.tsv"\n'
        '  sprite {\n    image_path: "sprite.png"\n    single_image_dim: 28\n    single_image_dim: 28\n  }\n}\n'
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(directory / "vectors.tsv") as file:
            np.savetxt(file, vectors, fmt="%.7g", delimiter="\t")
        with files.atomic_file(directory / "metadata.tsv") as file:
            file.write("".join(["Index\tLabel\n", *rows]).encode())
        with files.atomic_file(directory / "sprite.png") as file:
            PIL.Image.fromarray(sprite(images)).save(file, "png")
        with files.atomic_file(directory / "projector_config.pbtxt") as file:
            file.write(config.encode())
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error.strerror}); name another --output.") from error


def sprite(images: np.ndarray) -> np.ndarray:
    """Inverted images, uint8 (n, 28, 28), row by row in a square of ceil(sqrt(n)) a side, filled up white."""
    side = math.ceil(math.sqrt(len(images)))
    cells = np.full((side * side, 28, 28), 255, np.uint8)
    cells[: len(images)] = 255 - images
    return cells.reshape(side, side, 28, 28).swapaxes(1, 2).reshape(side * 28, side * 28)
