"""How far a picture is from the data, whatever a model says of it.

    python -m fmbench.data.likeness        fits likeness.npz again, and says what it does on the test images

A normal distribution is fitted to the pixels of the train images: the variances along its principal components,
and one for the rest (Tipping and Bishop 1999, "Probabilistic principal component analysis"). A picture is far if
its squared Mahalanobis distance is larger than that of 99 % of the validation images. A score of the net's own
would depend on the net: by the energy of its logits (Liu et al. 2020) one net finds 78 % of letters, another none.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmbench.data import fashion_mnist, photos, splits
from fmbench.system.files import atomic_file

FILE = Path(__file__).with_name("likeness.npz")
NUM_COMPONENTS = 64
FLOOR = 0.03  # added to variances, of pixels in [0, 1]: pixels that are nearly always black tell little
FALSE_ALARMS = 0.01  # of the validation images of Fashion-MNIST's default split; of the test images as many


class Normal(NamedTuple):
    """The distribution, and what is far from it."""

    mean: np.ndarray  # (784,), of pixels in [0, 1], like all
    components: np.ndarray  # (784, NUM_COMPONENTS), of length 1
    variances: np.ndarray  # (NUM_COMPONENTS,), along them
    rest: float  # along any other direction
    threshold: float


def unlike(image: np.ndarray, class_names: Sequence[str]) -> str:
    """Why an image, uint8 (28, 28), looks unlike the data of these classes; '' if it does not, or nobody knows."""
    is_known = tuple(class_names) == fashion_mnist.CLASS_NAMES
    far = "farther from it than 99 % of its images" if is_known and is_far(image[None])[0] else ""
    return photos.oddity(image) or far


def is_far(images: np.ndarray) -> np.ndarray:
    """Whether images, uint8 (n, 28, 28), are farther from Fashion-MNIST than 99 % of its own: bool (n,)."""
    return distances(images, _fitted()) > _fitted().threshold


def distances(images: np.ndarray, normal: Normal) -> np.ndarray:
    """Squared Mahalanobis distances, float32 (n,), of images, uint8 (n, 28, 28)."""
    deviations = images.reshape(-1, 784) / np.float32(255) - normal.mean
    along = deviations @ normal.components
    beside = np.square(deviations).sum(axis=1) - np.square(along).sum(axis=1)
    return (np.square(along) / normal.variances).sum(axis=1) + beside / normal.rest


def fit(dataset: fashion_mnist.Dataset) -> Normal:
    """Fits the train images of the default split; validation decides what is far."""
    train, validation = splits.split(dataset.train_labels, "default")
    pixels = dataset.train_images[train].reshape(-1, 784) / np.float32(255)
    variances, components = np.linalg.eigh(np.cov(pixels.T))  # ascending
    normal = Normal(
        mean=pixels.mean(axis=0),
        components=components[:, -NUM_COMPONENTS:].astype(np.float32),
        variances=(variances[-NUM_COMPONENTS:] + FLOOR).astype(np.float32),
        rest=float(variances[:-NUM_COMPONENTS].mean() + FLOOR),
        threshold=0.0,
    )
    held_out = distances(dataset.train_images[validation], normal)
    return normal._replace(threshold=float(np.quantile(held_out, 1 - FALSE_ALARMS)))


@functools.cache
def _fitted() -> Normal:
    with np.load(FILE, allow_pickle=False) as arrays:
        return Normal(
            *(arrays["mean"], arrays["components"], arrays["variances"]),
            rest=float(arrays["rest"]),
            threshold=float(arrays["threshold"]),
        )


def main() -> None:
    dataset = fashion_mnist.load()
    with atomic_file(FILE) as file:
        np.savez_compressed(file, allow_pickle=False, **fit(dataset)._asdict())
    print(f"{FILE}: {is_far(dataset.test_images).mean():.2%} of the test images are called far")


if __name__ == "__main__":
    main()
