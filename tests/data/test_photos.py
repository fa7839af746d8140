"""Images of any kind in, what the data set shows out: grey, 28 x 28, light on black."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from fmbench.data import fashion_mnist, photos
from fmbench.errors import UserError


@pytest.fixture(scope="module")
def article() -> np.ndarray:
    """A shoe: unlike its mirror images, and as any article of the data set on black."""
    dataset = fashion_mnist.load("sample")
    return dataset.test_images[list(dataset.test_labels).index(9)]


def save(path: Path, image: PIL.Image.Image | np.ndarray, **options) -> Path:
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    image.save(path, **options)
    return path


def test_the_data_sets_images_stay_as_they_are_and_their_negatives_are_turned_round(tmp_path):
    dataset = fashion_mnist.load("sample")
    for pixels in np.concatenate([dataset.train_images, dataset.test_images]):
        np.testing.assert_array_equal(photos.read_image(save(tmp_path / "a.bmp", pixels)), pixels)
        np.testing.assert_array_equal(photos.read_image(save(tmp_path / "a.bmp", 255 - pixels)), pixels)


def test_inversion_can_be_ordered_and_forbidden(article, tmp_path):
    positive, negative = save(tmp_path / "p.png", article), save(tmp_path / "n.png", 255 - article)
    np.testing.assert_array_equal(photos.read_image(positive, "yes"), 255 - article)
    np.testing.assert_array_equal(photos.read_image(positive, "no"), article)
    np.testing.assert_array_equal(photos.read_image(negative, "yes"), article)
    np.testing.assert_array_equal(photos.read_image(negative, "no"), 255 - article)


@pytest.mark.parametrize(
    ("mode", "endings"),
    [
        ("L", "png bmp gif tiff tga pgm webp jp2"),
        ("RGB", "png bmp gif tiff tga ppm webp"),
        ("RGBA", "png bmp tiff tga webp"),
        ("LA", "png tiff tga webp"),
        ("P", "png bmp gif tiff tga webp"),
    ],
)
def test_grey_is_grey_in_every_mode_and_format(mode, endings, article, tmp_path):
    for ending in endings.split():
        path = save(tmp_path / f"a.{ending}", PIL.Image.fromarray(article).convert(mode), lossless=True)
        np.testing.assert_array_equal(photos.read_image(path), article, ending)


def test_lossy_formats_and_cmyk_keep_the_picture(article, tmp_path):
    grey = PIL.Image.fromarray(article)
    inks = [save(tmp_path / f"inks.{ending}", grey.convert("CMYK")) for ending in ("tiff", "jpg")]
    for path in (*inks, save(tmp_path / "grey.jpg", grey, quality=95)):
        assert np.abs(photos.read_image(path).astype(int) - article).mean() < 3, path.name


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_cut_off(ending, article, tmp_path):
    path = save(tmp_path / f"deep.{ending}", article.astype(np.uint16) * 257)
    np.testing.assert_array_equal(photos.read_image(path), article)


def test_one_bit_is_black_and_white(article, tmp_path):
    path = save(tmp_path / "bits.png", PIL.Image.fromarray(article > 99))
    np.testing.assert_array_equal(photos.read_image(path), (article > 99) * 255)


def test_colours_become_their_luminance(tmp_path):
    path = save(tmp_path / "red.png", PIL.Image.new("RGB", (28, 28), (255, 0, 0)))
    assert (photos.read_image(path) == 76).all()  # 0.299 * 255


def test_exif_orientation_is_followed(article, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    path = save(tmp_path / "turned.png", article, exif=exif)
    np.testing.assert_array_equal(photos.read_image(path), np.rot90(article, k=-1))


def test_the_whole_of_a_large_image_is_reduced(article, tmp_path):
    reduced = photos.read_image(save(tmp_path / "large.png", np.kron(article, np.ones((8, 8), np.uint8))))
    assert np.abs(reduced.astype(int) - article).mean() < 10


@pytest.mark.parametrize("size", [(560, 280), (280, 560), (2, 1), (1, 2)])
def test_proportions_are_kept_between_black_margins(size, tmp_path):
    image = photos.read_image(save(tmp_path / "bar.png", PIL.Image.new("L", size, 90)))
    expected = np.zeros((28, 28), np.uint8)
    expected[7:21] = 90
    np.testing.assert_array_equal(image, expected if size[0] > size[1] else expected.T)


def test_a_photograph_on_white_is_an_article_on_black(tmp_path):
    photograph = PIL.Image.new("RGB", (300, 400), (250, 252, 249))
    photograph.paste((30, 20, 40), (100, 100, 200, 300))
    image = photos.read_image(save(tmp_path / "photo.jpg", photograph))
    assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 10
    assert image[10:18, 12:16].min() > 220


def test_a_thin_dark_frame_does_not_decide(article, tmp_path):
    framed = PIL.ImageOps.expand(PIL.Image.new("L", (398, 398), 255), border=1, fill=0)
    assert photos.read_image(save(tmp_path / "framed.png", framed)).mean() < 20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_background(mode, tmp_path):
    cut_out = PIL.Image.new("LA", (28, 28), (80, 0))
    cut_out.paste((40, 255), (8, 4, 20, 24))
    path = save(tmp_path / "cut.png", cut_out.convert("RGBA").convert(mode))
    inside = np.zeros((28, 28), np.uint8)
    inside[4:24, 8:20] = 1
    np.testing.assert_array_equal(photos.read_image(path), inside * 215)
    np.testing.assert_array_equal(photos.read_image(path, "yes"), inside * 215)
    np.testing.assert_array_equal(photos.read_image(path, "no"), inside * 40)


def test_standard_input_may_be_a_pipe(article, monkeypatch):
    file = io.BytesIO()
    PIL.Image.fromarray(article).save(file, "PNG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(file.getvalue())))
    np.testing.assert_array_equal(photos.read_image(Path("-")), article)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"%!PS-Adobe-3.0 EPSF"]
)
def test_what_is_no_image_is_named_with_the_formats_that_are(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png: cannot read it as an image; the formats are .*JPEG.*PNG"):
        photos.read_image(tmp_path / "broken.png")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tiff"])
def test_half_an_image_is_named(ending, kept, article, tmp_path):
    path = save(tmp_path / f"half.{ending}", np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(UserError, match=rf"half\.{ending}: cannot read it as an image") as error:
        photos.read_image(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.png: cannot read it as an image \(No such file or directory\)"):
        photos.read_image(tmp_path / "absent.png")


def test_an_image_that_claims_to_be_huge_is_named(article, tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", article)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"bomb\.png: cannot read it as an image"):
        photos.read_image(path)


def test_a_directory_has_its_images_sorted_and_no_others(tmp_path):
    for name in ("b.jpg", "C.PNG", "a.webp", "notes.txt", "d.eps", "deeper/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in photos.image_files(tmp_path)] == ["C.PNG", "a.webp", "b.jpg"]
    with pytest.raises(UserError, match="empty: no images in this directory"):
        (tmp_path / "empty").mkdir()
        photos.image_files(tmp_path / "empty")
