"""Augmentation of training images: pure functions of a key, for jitted steps.

Every example has a key of its own, folded from the step's key and its place in the global batch, so that any
layout of the batch over devices augments it alike. Images are (28, 28) float32, grey levels from 0 to 255, on a
black background.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fmbench.errors import UserError
from fmbench.layers import random_words
from fmbench.system import import_path

SIDE = 28  # pixels
Settings = dict[str, Any]  # as `fmbench.config.no_augmentation` has them


def example_keys(key: jax.Array, positions: ArrayLike) -> jax.Array:
    """A key for each place in the global batch: positions int32 (n,) -> keys (n,)."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def augment(keys: jax.Array, images: ArrayLike, settings: Settings) -> jax.Array:
    """Changes each image by itself: affine, crop, flip, erasing, then a function of somebody else's.

    Args:
        keys: One for each image, (n,).
        images: (n, 784) or (n, 28, 28), any real dtype, grey levels.
        settings: As `fmbench.config.no_augmentation` has them; mixup and cutmix are `mix`'s.

    Returns:
        float32 (n, 28, 28), grey levels; the images themselves where all strengths are zero.

    Raises:
        UserError: If settings["function"] is no import path of a function (key, image) -> image, both float32
            (28, 28), or fails.
    """
    images = jnp.asarray(images).reshape(-1, SIDE, SIDE).astype(jnp.float32)

    def augment_one(key: jax.Array, image: jax.Array) -> jax.Array:
        affine_key, crop_key, flip_key, cutout_key, erasing_key = jax.random.split(key, 5)
        if settings["rotation"] or settings["shift"] or settings["zoom"] or settings["shear"]:
            image = affine(image, **_random_affine(affine_key, settings))
        if settings["crop_padding"]:
            image = _pad_and_crop(crop_key, image, settings["crop_padding"])
        if settings["flip"]:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        if settings["cutout"]:
            image = _cutout(cutout_key, image, settings["cutout"])
        if settings["random_erasing"]:
            image = _random_erasing(erasing_key, image, settings["random_erasing"])
        if settings["function"]:
            image = _call(settings["function"], jax.random.fold_in(key, 5), image)
        return image

    return jax.vmap(augment_one)(keys, images)


def mixes(settings: Settings) -> bool:
    """Whether `mix` has something to do."""
    return bool(settings["mixup"] or settings["cutmix"])


def mix(
    keys: jax.Array, images: jax.Array, partners: jax.Array, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    """Blends each image with its partner (mixup), or pastes a rectangle of the partner into it (cutmix).

    Args:
        keys: One for each image, (n,).
        images: float32 (n, 28, 28).
        partners: float32 (n, 28, 28).
        settings: As `fmbench.config.no_augmentation` has them.

    Returns:
        The mixed images, and the image's own share of each, float32 (n,): 1 minus that of its partner, for labels.

    References:
        Zhang et al., 2018, "mixup: Beyond empirical risk minimization"; Yun et al., 2019, "CutMix". Weights are
        drawn for every example, not once for the batch.
    """

    def mix_one(key: jax.Array, image: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight_key, box_key = jax.random.split(key)
        if settings["mixup"]:
            share = jax.random.beta(weight_key, settings["mixup"], settings["mixup"])
            return share * image + (1 - share) * partner, share
        share = jax.random.beta(weight_key, settings["cutmix"], settings["cutmix"])
        side = SIDE * jnp.sqrt(1 - share)
        centre = jax.random.uniform(box_key, (2,), maxval=SIDE)
        inside = _rectangle(*jnp.round(centre - side / 2), *jnp.round(centre + side / 2))
        return jnp.where(inside, partner, image), 1 - inside.mean()

    return jax.vmap(mix_one)(keys, images, partners)


def affine(
    image: jax.Array, *, rotation: jax.Array, shift: jax.Array, shear: jax.Array, zoom: jax.Array
) -> jax.Array:
    """Rotates, shifts, shears and zooms in one bilinear resampling; beyond the border lies the nearest pixel.

    Args:
        image: (28, 28).
        rotation: Radians.
        shift: (2,), pixels, rows and columns.
        shear: Radians.
        zoom: (2,), rows and columns; below 1 magnifies.

    Returns:
        The image, (28, 28), whose pixel at p is the old one at c + R S H Z (p - c), c the centre.

    References:
        Keras's `apply_affine_transform`: the same matrices in the same order.
    """
    sin, cos = jnp.sin(rotation), jnp.cos(rotation)
    rotate = jnp.array([[cos, -sin], [sin, cos]])
    shears = jnp.array([[1.0, -jnp.sin(shear)], [0.0, jnp.cos(shear)]])
    # Written out: XLA may run a matrix product in fewer bits than float32 has.
    matrix = (rotate[:, :, None] * shears[None]).sum(axis=1) * zoom
    offset = (rotate * shift).sum(axis=1)
    centre = (SIDE - 1) / 2
    rows, columns = jnp.mgrid[:SIDE, :SIDE].astype(jnp.float32) - centre
    coordinates = [m[0] * rows + m[1] * columns + o + centre for m, o in zip(matrix, offset, strict=True)]
    return jax.scipy.ndimage.map_coordinates(image, coordinates, order=1, mode="nearest")


def _random_affine(key: jax.Array, settings: Settings) -> dict[str, jax.Array]:
    draws = jax.random.uniform(key, (6,), minval=-1)
    return {
        "rotation": jnp.deg2rad(settings["rotation"] * draws[0]),
        "shift": SIDE * settings["shift"] * draws[1:3],
        "shear": jnp.deg2rad(settings["shear"] * draws[3]),
        "zoom": 1 + settings["zoom"] * draws[4:6],
    }


def _call(path: str, key: jax.Array, image: jax.Array) -> jax.Array:
    function = import_path.load(path, "config.augment.function")
    said = f"config.augment.function is '{path}', which"
    misfit = import_path.misfit(function, given=(), places=2) if callable(function) else "is no function"
    if misfit:
        raise UserError(f"{said} {misfit}; it must take a key and an image.")
    try:
        result = jnp.asarray(function(key, image))
    except Exception as error:  # whatever their function may raise, its author wants to read it
        raise UserError(f"{said} fails: {import_path.describe(error, function)}.") from error
    if (result.shape, result.dtype) != (image.shape, image.dtype):
        raise UserError(
            f"{said} returns {result.dtype} {result.shape}; it must return the image, {image.dtype} {image.shape}."
        )
    return result


def _pad_and_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    corner = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(jnp.pad(image, padding), corner, (SIDE, SIDE))


def _cutout(key: jax.Array, image: jax.Array, side: int) -> jax.Array:
    """Blackens a square whose centre is any pixel (DeVries & Taylor, 2017, "Improved regularization ...")."""
    top, left = jax.random.randint(key, (2,), 0, SIDE) - side // 2
    return jnp.where(_rectangle(top, left, top + side, left + side), 0, image)


def _random_erasing(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Fills a rectangle with noise: 2 to 40 % of the area, sides in the ratio 0.3 to 3.3, all of it inside.

    References:
        Zhong et al., 2020, "Random erasing data augmentation", with their constants. A side that would not fit is
        cut to the image's, where they draw again.
    """
    box_key, noise_key = jax.random.split(key)
    draws = jax.random.uniform(box_key, (5,))
    area = SIDE * SIDE * (0.02 + 0.38 * draws[0])
    ratio = 0.3 * (1 / 0.3**2) ** draws[1]
    size = jnp.minimum(jnp.round(jnp.sqrt(jnp.array([area * ratio, area / ratio]))), SIDE)
    corner = jnp.floor(draws[2:4] * (SIDE - size + 1))
    noise = (random_words(noise_key[None], image.shape)[0] >> 24).astype(image.dtype)
    inside = _rectangle(*corner, *(corner + size)) & (draws[4] < probability)
    return jnp.where(inside, noise, image)


def _rectangle(top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array) -> jax.Array:
    """Which pixels lie in top <= row < bottom, left <= column < right: bool (28, 28)."""
    places = jnp.arange(SIDE, dtype=top.dtype)
    rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)
    return rows[:, None] & columns[None, :]
