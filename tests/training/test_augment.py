"""Augmentation: nothing at zero strength, Keras's affine, and each of the others by its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from fmbench import config as config_lib
from fmbench.data import fashion_mnist
from fmbench.errors import UserError
from fmbench.training import augment

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEYS = jax.random.split(jax.random.key(0), 200)


@pytest.fixture(scope="module")
def images():
    return np.array(fashion_mnist.load("sample").test_images)  # (200, 28, 28)


def settings(**strengths):
    return config_lib.no_augmentation().to_dict() | strengths


def run(images, **strengths):
    return np.asarray(jax.jit(lambda images: augment.augment(KEYS, images, settings(**strengths)))(images))


def test_nothing_at_zero_strength(images):
    np.testing.assert_array_equal(run(images), images)
    zero = {"rotation": jnp.zeros(()), "shift": jnp.zeros(2), "shear": jnp.zeros(()), "zoom": jnp.ones(2)}
    same = jax.jit(jax.vmap(lambda image: augment.affine(image, **zero)))(images.astype(np.float32))
    np.testing.assert_array_equal(same, images)


def keras_affine(image, rotation, shift, shear, zoom):
    """Keras's `apply_affine_transform`, by its matrices, with scipy."""
    rotate = np.array(
        [[np.cos(rotation), -np.sin(rotation), 0], [np.sin(rotation), np.cos(rotation), 0], [0, 0, 1]]
    )
    move = np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]])
    slant = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    matrix = rotate @ move @ slant @ np.diag([*zoom, 1])
    centre = np.array([[1, 0, 13.5], [0, 1, 13.5], [0, 0, 1]])
    matrix = centre @ matrix @ np.linalg.inv(centre)
    return scipy.ndimage.affine_transform(image, matrix[:2, :2], matrix[:2, 2], order=1, mode="nearest")


@pytest.mark.parametrize(
    ("rotation", "shift", "shear", "zoom"),
    [
        (0.14, (0.0, 0.0), 0.0, (1.0, 1.0)),
        (0.0, (2.24, -1.5), 0.0, (1.0, 1.0)),
        (0.0, (0.0, 0.0), 0.3, (1.0, 1.0)),
        (0.0, (0.0, 0.0), 0.0, (0.92, 1.08)),
        (-0.5, (-3.3, 7.7), 0.2, (1.3, 0.8)),
    ],
)
def test_affine_is_that_of_keras(images, rotation, shift, shear, zoom):
    for image in images[::40].astype(np.float32):
        got = augment.affine(image, rotation=rotation, shift=jnp.array(shift), shear=shear, zoom=jnp.array(zoom))
        np.testing.assert_allclose(got, keras_affine(image, rotation, shift, shear, zoom), atol=0.02)


def test_random_affine_parameters_fill_their_ranges():
    draw = jax.vmap(
        lambda key: augment._random_affine(key, settings(rotation=8.0, shift=0.08, zoom=0.08, shear=0.3))
    )
    drawn = draw(jax.random.split(jax.random.key(1), 5000))
    limits = {"rotation": np.deg2rad(8), "shift": 0.08 * 28, "shear": np.deg2rad(0.3)}
    for name, limit in limits.items():
        np.testing.assert_allclose([drawn[name].min(), drawn[name].max()], [-limit, limit], rtol=0.01)
    np.testing.assert_allclose([drawn["zoom"].min(), drawn["zoom"].max()], [0.92, 1.08], rtol=0.001)
    together = np.column_stack([drawn["rotation"], drawn["shift"], drawn["shear"], drawn["zoom"]])
    assert np.abs(np.corrcoef(together.T) - np.eye(6)).max() < 0.06  # all six are independent


def test_crop_takes_every_place_of_the_padded_image(images):
    cropped = run(np.repeat(images[:1], 200, axis=0), crop_padding=1)
    padded = np.pad(images[0], 1)
    places = {(i, j): padded[i : i + 28, j : j + 28] for i in range(3) for j in range(3)}
    seen = set()
    for image in cropped:
        (place,) = (place for place, crop in places.items() if np.array_equal(crop, image))
        seen.add(place)
    assert len(seen) == 9


def test_flip_turns_about_half_of_the_images(images):
    flipped = run(images, flip=True)
    turned = [np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, images, strict=True)]
    same = [np.array_equal(new, old) for new, old in zip(flipped, images, strict=True)]
    assert all(np.logical_or(turned, same))
    assert 70 < sum(turned) < 130


def test_cutout_blackens_a_square_clipped_at_the_border():
    cut = run(np.full((200, 28, 28), 255, np.uint8), cutout=8)
    assert set(np.unique(cut)) == {0, 255}
    heights = (cut == 0).any(axis=2).sum(axis=1)
    assert heights.max() == 8
    assert heights.min() == 4  # centred on a corner
    np.testing.assert_array_equal((cut == 0).sum(axis=(1, 2)), heights * (cut == 0).any(axis=1).sum(axis=1))


def test_random_erasing_fills_rectangles_of_the_stated_sizes():
    white = np.full((200, 28, 28), 300, np.float32)  # a level that noise cannot have
    erased = run(white, random_erasing=0.5) != 300
    hit = erased.any(axis=(1, 2))
    assert 70 < hit.sum() < 130
    heights, widths = erased[hit].any(axis=2).sum(axis=1), erased[hit].any(axis=1).sum(axis=1)
    areas = erased[hit].sum(axis=(1, 2))
    np.testing.assert_array_equal(areas, heights * widths)
    assert areas.min() > 0.01 * 784
    assert areas.max() < 0.45 * 784
    assert (heights > widths).any()
    assert (heights < widths).any()
    noise = run(white, random_erasing=1.0)
    noise = noise[noise != 300]
    assert (noise.min(), noise.max()) == (0, 255)
    assert abs(noise.mean() - 127.5) < 2


def test_mixup_weights_images_and_says_the_share(images):
    partners = images[::-1].astype(np.float32)
    mixed, share = augment.mix(KEYS, images.astype(np.float32), partners, settings(mixup=0.4))
    expected = share[:, None, None] * images.astype(np.float32) + (1 - share[:, None, None]) * partners
    np.testing.assert_allclose(mixed, expected, atol=1e-3)
    assert abs(share.mean() - 0.5) < 0.08
    np.testing.assert_allclose(share.var(), 1 / (4 * (2 * 0.4 + 1)), rtol=0.15)  # of Beta(0.4, 0.4)


def test_cutmix_pastes_a_rectangle_and_says_the_share_left():
    zeros, ones = jnp.zeros((200, 28, 28)), jnp.ones((200, 28, 28))
    mixed, share = augment.mix(KEYS, zeros, ones, settings(cutmix=1.0))
    assert set(np.unique(mixed)) == {0, 1}
    np.testing.assert_allclose(share, 1 - np.asarray(mixed).mean(axis=(1, 2)), atol=1e-6)
    heights, widths = (np.asarray(mixed).any(axis=axis).sum(axis=1) for axis in (2, 1))
    np.testing.assert_array_equal(np.asarray(mixed).sum(axis=(1, 2)), heights * widths)
    assert len(np.unique(share)) > 100


def test_every_place_of_the_batch_has_a_key_of_its_own():
    keys = jax.random.key_data(augment.example_keys(jax.random.key(0), jnp.arange(100)))
    assert len(np.unique(keys, axis=0)) == 100
    shard = jax.random.key_data(augment.example_keys(jax.random.key(0), jnp.arange(50, 60)))
    np.testing.assert_array_equal(shard, keys[50:60])


def test_only_key_and_image_decide(images):
    strengths = {"rotation": 8.0, "flip": True, "random_erasing": 0.5, "crop_padding": 2}
    together = run(images, **strengths)
    apart = augment.augment(KEYS[50:60], images[50:60], settings(**strengths))
    np.testing.assert_allclose(apart, together[50:60], atol=1e-3)
    assert not np.array_equal(together[:100], run(images[:100].repeat(2, axis=0), **strengths)[:100])


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"rotation": -1.0}, r"config\.augment\.rotation is -1\.0; it must be at least 0\."),
        ({"zoom": 1.0}, r"zoom is 1\.0; it must be at least 0 and at most 0\.99"),
        ({"random_erasing": 1.5}, "random_erasing is 1.5"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"mixup": 0.2, "cutmix": 1.0}, "both mixup and cutmix"),
    ],
)
def test_meaningless_strengths_are_refused(strengths, message):
    with pytest.raises(UserError, match=message):
        config_lib._check_augment("augment", settings(**strengths))


# Somebody else's.


def test_a_function_comes_last_and_changes_nothing_before_it(images):
    flipped = run(images, flip=True)
    np.testing.assert_array_equal(run(images, flip=True, function="outside:invert"), 255 - flipped)


def test_every_image_has_a_key_of_its_own(images):
    noise = run(np.zeros_like(images), function="outside:noise")
    assert len(np.unique(noise[:, 0, 0])) == len(images)
    np.testing.assert_array_equal(noise, run(np.zeros_like(images), function="outside:noise"))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("outside:upper_half", r"returns float32 \(14, 28\); it must return the image, float32 \(28, 28\)"),
        ("outside:to_integers", r"returns uint8 \(28, 28\)"),
        ("outside:takes_an_image_alone", "takes 1 arguments by their place, and is given 2"),
        ("outside:fails_on_images", r"fails: TypeError: .*outside\.py:\d+\)"),
        ("outside:A_NUMBER", "is no function"),
        ("outside:nosie", "the nearest is noise"),
        ("flip", r"an import path is package\.module:Name"),
    ],
)
def test_what_a_function_does_wrong_is_said_in_one_line(images, function, said):
    with pytest.raises(UserError, match=f"config.augment.function is '{function}'.*{said}") as error:
        run(images, function=function)
    assert "\n" not in str(error.value)
