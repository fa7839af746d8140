"""Lays images out in the plane so that similar ones lie together: t-SNE of their pixels or of a model's features.

    python -m fmbench.embed
    python -m fmbench.embed --model=workdirs/cnn3-cpu-float32-seed0 --layer=dense1 --num_images=2000 --projector
    tensorboard --logdir=figures/embedding/projector/cnn3-cpu-float32-seed0-dense1

A layer's features are what it returns, as a rule before the model's activation function; without --layer they are
what the last dense layer, `head`, is given.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from fmbench.data import fashion_mnist, features
from fmbench.errors import UserError
from fmbench.models import exported
from fmbench.records import store
from fmbench.system import command_line, runtime
from fmbench.training import inference

FEWEST_IMAGES = 10  # of which neighbours can be spoken


@command_line.plain_errors("embed")
def main() -> None:
    parser = command_line.Parser("embed", description=__doc__)
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
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    with command_line.needs_extra("figures"):
        from fmbench.pages import drawing, embedding
    if arguments.model:
        record, dataset = store.read_run(arguments.model)
        images, labels = first_images(dataset, arguments.split, arguments.num_images)
        model, description = exported.load_model(arguments.model)
        inputs = images
        if description["normalization"] == "none":  # the model is one on a backbone's features
            inputs = backbone_features(dataset, arguments.split, description["features"])[: len(images)]
        vectors = inference.layer_features(model, inputs, description["normalization"], arguments.layer)
        name = f"{record.name}-{arguments.layer or 'features'}"
    else:
        dataset = fashion_mnist.load()
        images, labels = first_images(dataset, arguments.split, arguments.num_images)
        vectors = images.reshape(len(images), -1) / np.float32(255)
        name = "pixels"

    begin = time.perf_counter()
    positions = embedding.t_sne(vectors)
    seconds = time.perf_counter() - begin
    title = f"t-SNE of {len(images):,} {arguments.split} images in {seconds:.1f} s\n{name}"
    path = arguments.output / f"tsne-{name}.{arguments.format}"
    drawing.save(embedding.draw(positions, labels, images, title, dataset.class_names), path)
    print(path)
    if arguments.projector:
        directory = arguments.output / "projector" / name
        embedding.write_projector(directory, vectors, labels, images, dataset.class_names)
        print(f"{directory}: tensorboard --logdir={directory} shows it")


def first_images(dataset: fashion_mnist.Dataset, split: str, num_images: int) -> tuple[np.ndarray, np.ndarray]:
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


def backbone_features(dataset: fashion_mnist.Dataset, split: str, spec: dict[str, Any]) -> np.ndarray:
    """The features of a split on which a run was trained, (n, num_features), as a rule from the cache."""
    images, part = {
        "train": (dataset.train_images, "train-images"),
        "test": (dataset.test_images, "t10k-images"),
    }[split]
    return features.load(images, dataset.sha256[part], features.Spec(**spec))


if __name__ == "__main__":
    main()
