"""What a frozen backbone makes of the images: computed once, then read from the cache.

Images are enlarged on the device, bilinearly, grey as all three colours, and preprocessed as the backbone's
weights expect it ('imagenet'), or by a mistake that has been published ('rescaled_twice').
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fmbench.data import pretrained
from fmbench.models import split_model
from fmbench.models.transfer import BACKBONES
from fmbench.system import files
from fmbench.system.files import atomic_file

BATCH_SIZE = 32
IMAGES_PER_FILE = 10_000
VERSION = 1  # to be raised when the same weights and images get other features: it is part of the files' names

# VGG19 has 8,192 features of an image, 1.1 GB of the whole data set even so.
STORED_AS = {"efficientnet_lite0": np.float32, "vgg19": np.float16}

VGG19_MEAN_BGR = (103.939, 116.779, 123.68)


class Spec(NamedTuple):
    """How features are made: config.features."""

    backbone: str  # a key of BACKBONES
    weights: str  # path of the file, or '' for where `fmbench.pretrained` finds them
    image_size: int  # side to which images are enlarged
    preprocessing: str  # imagenet, rescaled_twice


def load(images: np.ndarray, sha256: str, spec: Spec) -> np.ndarray:
    """The features of `images`, from the cache as far as they are there.

    Files hold 10,000 images each, so that a stopped extraction loses little. Their names tell the weights (the
    beginning of their hash), the preprocessing and the images.

    Args:
        images: uint8 (n, 28, 28).
        sha256: Of the images, proven.
        spec: How to make features.

    Returns:
        (n, num_features), in the backbone's type of `STORED_AS`.

    Raises:
        UserError: If features are to be computed and the weights can't be had.
    """
    weights = pretrained.DIGESTS[spec.backbone].expected
    directory = files.cache_directory() / "features"
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{spec.backbone}-{weights[:8]}-{spec.image_size}-{spec.preprocessing}-v{VERSION}-{sha256}"
    parts = []
    with tqdm(total=len(images), desc=f"features of {spec.backbone}", unit="image", disable=None) as progress:
        for start in range(0, len(images), IMAGES_PER_FILE):
            part = images[start : start + IMAGES_PER_FILE]
            path = directory / f"{name}-{start}.npy"
            rows = _read(path, len(part))
            if rows is None:
                rows = extract(part, spec, progress)
                with atomic_file(path) as file:
                    np.save(file, rows)
            else:
                progress.update(len(part))
            parts.append(rows)
    return np.concatenate(parts)


def _read(path: Path, num_images: int) -> np.ndarray | None:
    """The features in a file; None if there is no such file, or not a whole one."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return rows if len(rows) == num_images else None


def extract(images: np.ndarray, spec: Spec, progress: tqdm | None = None) -> np.ndarray:
    """Computes features.

    Args:
        images: uint8 (n, 28, 28).
        spec: How.
        progress: A bar to be moved on by the number of images done.

    Returns:
        (n, num_features), in the backbone's type of `STORED_AS`.

    Raises:
        UserError: If the weights can't be had.
    """
    size = min(BATCH_SIZE, len(images))
    run = _extractor(spec)
    parts = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        filled = np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0)))
        parts.append(np.asarray(run(filled))[: len(batch)].astype(STORED_AS[spec.backbone]))
        if progress is not None:
            progress.update(len(batch))
    return np.concatenate(parts)


def model_input(description: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """What an exported model takes: the images themselves, uint8 (n, 28, 28), or their features.

    Args:
        description: From `checkpoint.load_model`.
        images: uint8 (n, 28, 28).

    Raises:
        UserError: If the weights of the model's backbone can't be had.
    """
    if not description.get("features", {}).get("backbone"):
        return images
    return extract(images, Spec(**description["features"]))


@functools.cache
def _extractor(spec: Spec) -> Callable[[np.ndarray], jax.Array]:
    """Images, uint8 (n, 28, 28), -> features, float32 (n, num_features), with the weights on the device."""
    graphdef, _, _ = split_model(nnx.eval_shape(lambda: BACKBONES[spec.backbone](rngs=nnx.Rngs(0))))
    params = jax.device_put(pretrained.load(spec.backbone, spec.weights))

    @jax.jit
    def run(params: pretrained.Params, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, {})(preprocess(images, spec))

    return functools.partial(run, params)


def preprocess(images: jax.Array, spec: Spec) -> jax.Array:
    """Grey levels (n, 28, 28) -> what the backbone takes, float32 (n, image_size, image_size, 3).

    'rescaled_twice' divides by 255 what the backbone's own preprocessing takes on 0..255. After that the images
    differ by less than one grey level, and all look the same to the net.
    """
    size = (len(images), spec.image_size, spec.image_size)
    grey = jax.image.resize(images.astype(jnp.float32), size, "linear")
    if spec.preprocessing == "rescaled_twice":
        grey = grey / 255
    x = jnp.repeat(grey[..., None], 3, axis=-1)
    if spec.backbone == "vgg19":
        return x - jnp.array(VGG19_MEAN_BGR)
    return (x - 127) / 128
