"""How far a picture is from the data: letters and noise are far, articles are not."""

import io

import drawn
import numpy as np
import pytest

from fmbench.data import fashion_mnist, likeness, photos


def seen(pictures) -> np.ndarray:
    """What the models see of pictures, uint8 (n, 28, 28)."""
    images = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        images.append(photos.read_image(file))
    return np.stack(images)


def test_letters_and_noise_are_far_and_articles_are_not():
    others = dict(drawn.no_articles())
    signs = seen(picture for name, picture in others.items() if name.startswith("sign"))
    noise = seen(picture for name, picture in others.items() if name.startswith("noise"))
    articles = seen(picture for label in drawn.ARTICLES for _, picture in drawn.scenes(label))
    assert (len(signs), likeness.is_far(signs).sum()) == (36, 32)
    assert (len(noise), likeness.is_far(noise).sum()) == (20, 18)
    assert (len(articles), likeness.is_far(articles).sum()) == (120, 7)
    sample = fashion_mnist.load("sample").test_images
    assert likeness.is_far(sample).mean() <= 0.03


def test_a_reason_is_given_and_none_of_data_that_nobody_measured():
    (letter,) = seen(picture for name, picture in drawn.no_articles() if name == "sign-B")
    assert likeness.unlike(letter, fashion_mnist.CLASS_NAMES) == "farther from it than 99 % of its images"
    assert likeness.unlike(letter, list("0123456789")) == ""
    empty = np.zeros((28, 28), np.uint8)
    assert likeness.unlike(empty, list("0123456789")) == "nearly empty"


@pytest.mark.full
def test_one_test_image_in_a_hundred_is_called_far_and_the_file_is_what_the_data_give():
    dataset = fashion_mnist.load()
    assert likeness.is_far(dataset.test_images).sum() == 97
    assert likeness.fit(dataset).threshold == pytest.approx(likeness._fitted().threshold, rel=1e-3)
