"""Images of any kind in, what the data set shows out: grey, 28 x 28, light on black."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path

import drawn
import hypothesis
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import strategies as st

from fmbench.data import fashion_mnist, photos
from fmbench.errors import UserError


@pytest.fixture(scope="module")
def article() -> np.ndarray:
    """A shoe: unlike its mirror images, and as any article of the data set on black."""
    dataset = fashion_mnist.load("sample")
    return dataset.test_images[list(dataset.test_labels).index(9)]


# What holds grey levels: numbers of so many bits, stored as which type, in a file of which ending.
DEEP = [
    *((bits, np.uint16, ending) for bits in (8, 10, 12, 14, 16) for ending in ("png", "tiff", "pgm", "jp2")),
    *((bits, np.int32, "tiff") for bits in (8, 10, 12, 14, 16)),
    *((bits, np.float32, "tiff") for bits in (8, 10, 12, 14, 16)),
]


# The most KiB that the process held. (What `resource` says would begin with what its parent held.)
READ_AND_TELL_MEMORY = """
import re, sys
from pathlib import Path
from fmbench.data import photos
try:
    photos.read_image(Path(sys.argv[1]))
finally:
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory was held")


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


@pytest.mark.parametrize(("bits", "dtype", "ending"), DEEP)
def test_grey_levels_are_read_by_their_range_not_their_container(bits, dtype, ending, article, tmp_path):
    """The article reaches 255, so its largest number is 2**bits - 1."""
    levels = np.rint(article.astype(np.float64) * ((2**bits - 1) / 255))
    path = save(tmp_path / f"deep.{ending}", PIL.Image.fromarray(levels.astype(dtype)))
    np.testing.assert_array_equal(photos.read_image(path), article)
    path = save(tmp_path / f"deep.{ending}", PIL.Image.fromarray((levels.max() - levels).astype(dtype)))
    np.testing.assert_array_equal(photos.read_image(path), article)


def test_fractions_are_of_one(article, tmp_path):
    path = save(tmp_path / "deep.tiff", PIL.Image.fromarray(article.astype(np.float32) / 255))
    np.testing.assert_array_equal(photos.read_image(path), article)
    path = save(tmp_path / "deep.tiff", PIL.Image.fromarray(article.astype(np.float32) + 0.25))
    np.testing.assert_array_equal(photos.read_image(path), article)


@pytest.mark.parametrize(
    ("level", "dtype", "said"),
    [
        (-1, np.int32, "from -1 to"),
        (70_000, np.int32, "to 70000;"),
        (-0.01, np.float32, "from -0.01 to"),
        (1.02, np.float32, "to 1.02;"),
        (np.nan, np.float32, "from nan to nan"),
        (np.inf, np.float32, "to inf"),
    ],
)
def test_grey_levels_of_no_range_or_of_two_are_refused(level, dtype, said, tmp_path):
    levels = np.linspace(0, 1, 784).reshape(28, 28).astype(dtype)
    levels[14, 14] = level
    path = save(tmp_path / "deep.tiff", PIL.Image.fromarray(levels))
    with pytest.raises(UserError, match=rf"deep\.tiff: cannot read its grey levels, which go .*{said}"):
        photos.read_image(path)


def png_of_colours(levels: np.ndarray) -> bytes:
    """A PNG of 16 bits per colour, which Pillow cannot write, from uint16 (height, width, 3)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_colours_of_sixteen_bits_are_read_where_they_use_them(article, tmp_path):
    colours = np.repeat(article[..., None].astype(np.uint16), 3, axis=2)
    (tmp_path / "deep.png").write_bytes(png_of_colours(colours * 257))
    np.testing.assert_array_equal(photos.read_image(tmp_path / "deep.png"), article)
    for shift in (0, 2, 4):  # 8, 10 and 12 bits
        (tmp_path / "deep.png").write_bytes(png_of_colours(colours << shift))
        with pytest.raises(UserError, match=r"deep\.png: cannot read its colours: of their 16 bits the upper"):
            photos.read_image(tmp_path / "deep.png")


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
    article = np.where(article > 40, article, 0)  # what is nearly black is trimmed
    rows = np.flatnonzero(article.any(axis=1))
    centred = np.roll(article, (27 - rows[-1] - rows[0]) // 2, axis=0)
    reduced = photos.read_image(save(tmp_path / "large.png", np.kron(article, np.ones((8, 8), np.uint8))))
    assert article.any(axis=0).all()  # it is as wide as the picture already
    assert np.abs(reduced.astype(int) - centred).mean() < 10


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


@pytest.fixture
def pipe(monkeypatch):
    """Makes a pipe standard input; what it is given is written there from a thread, and the pipe closed."""
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))

    def write(content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as file:
            file.write(content)

    yield lambda content: threading.Thread(target=write, args=(content,), daemon=True).start()
    sys.stdin.close()


def test_standard_input_may_be_a_pipe(article, pipe):
    file = io.BytesIO()
    PIL.Image.fromarray(article).save(file, "PNG")
    pipe(file.getvalue())
    np.testing.assert_array_equal(photos.read_image(Path("-")), article)


def test_standard_input_without_end_is_read_no_further_than_an_image_could_be(pipe, monkeypatch):
    monkeypatch.setattr(photos, "MOST_PIPED_BYTES", 2**21)
    pipe(bytes(2**23))
    with pytest.raises(UserError, match="-: standard input has more than 2 MB; name a file"):
        photos.read_image(Path("-"))


def test_standard_input_that_gives_nothing_is_not_waited_for_for_ever(pipe, monkeypatch):
    monkeypatch.setattr(photos, "IDLE_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"-: standard input gave nothing for 0\.1 seconds"):
        photos.read_image(Path("-"))


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    said = "a directory" if kind == "directory" else "a pipe or device"
    with pytest.raises(UserError, match=rf"a\.png: cannot read it as an image, it is {said}; name a file"):
        photos.read_image(path)


@on_linux
@pytest.mark.parametrize(
    "head",
    [
        b"RIFF\xff\xff\xff\x6fWEBPVP8 ",
        b"\x89PNG\r\n\x1a\n\x6f\xff\xff\xffzTXt",
        b"II*\0\x08\0\0\0\x01\0\xbc\x02\x01\0\0\0\0\x70",
        b"\xff\xd8\xff\xe0",
    ],
    ids=["WebP", "PNG", "TIFF", "JPEG"],
)
def test_of_a_file_without_end_little_is_read(head, tmp_path):
    """Pillow would read all of a WebP, of a chunk or tag what it claims to have, and of a JPEG byte after byte."""
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(2**31)
    done = subprocess.run([sys.executable, "-c", READ_AND_TELL_MEMORY, path], capture_output=True, text=True)
    assert "cannot read it as an image, it has 128 MB that are no pixels" in done.stderr
    assert int(done.stdout) < 2**20


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


@pytest.mark.parametrize("limit", [100, 500])  # Pillow raises beyond twice its limit, and warns before
def test_an_image_that_claims_to_be_huge_is_named(article, tmp_path, monkeypatch, limit):
    path = save(tmp_path / "bomb.png", article)
    monkeypatch.setattr(photos, "MOST_PIXELS", limit)
    with pytest.raises(UserError, match=r"bomb\.png: cannot read it as an image of more than 0 million pixels"):
        photos.read_image(path)


def with_size(png: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_a_bomb_of_a_few_bytes_is_refused_by_its_header(article, tmp_path):
    path = save(tmp_path / "bomb.png", article)
    path.write_bytes(with_size(path.read_bytes(), 50_000, 50_000))
    with pytest.raises(UserError, match=r"an image of more than 536 million pixels; reduce it"):
        photos.read_image(path)


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (40_000, 1)])
def test_what_would_be_thinner_than_a_pixel_is_refused(size, tmp_path):
    path = save(tmp_path / "line.png", PIL.Image.new("L", size, 200))
    with pytest.raises(UserError, match=rf"line\.png: cannot read {size[0]} x {size[1]} pixels as an article"):
        photos.read_image(path)


def large(article: np.ndarray, side: int, mode: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(article).resize((side, side), PIL.Image.Resampling.NEAREST).convert(mode)


@pytest.mark.parametrize(("mode", "ending"), [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "png")])
def test_large_photographs_are_reduced_in_strips_as_if_at_once(mode, ending, article, tmp_path, recwarn):
    expected = photos.read_image(save(tmp_path / f"small.{ending}", large(article, 896, mode)))
    image = photos.read_image(save(tmp_path / f"large.{ending}", large(article, 28 * 128, mode)))
    assert np.abs(image.astype(int) - expected).max() <= (6 if ending == "jpg" else 2)
    assert recwarn.list == []


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize(("side", "ending"), [(20_000, "jpg"), (11_000, "png")])
def test_a_phones_largest_photographs_are_read_in_little_memory(side, ending, article, tmp_path):
    path = save(tmp_path / f"photo.{ending}", large(article, side, "RGB" if ending == "jpg" else "L"))
    done = subprocess.run([sys.executable, "-c", READ_AND_TELL_MEMORY, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 2**20


def test_a_directory_has_its_images_sorted_and_no_others(tmp_path):
    for name in ("b.jpg", "C.PNG", "a.webp", "._a.webp", "notes.txt", "d.eps", "deeper/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, others = photos.image_files(tmp_path)
    assert [path.name for path in files] == ["C.PNG", "a.webp", "b.jpg"]
    assert [path.name for path in others] == ["d.eps"]
    with pytest.raises(UserError, match="empty: no images in this directory"):
        (tmp_path / "empty").mkdir()
        photos.image_files(tmp_path / "empty")


def test_a_folder_of_none_but_others_names_one(tmp_path):
    (tmp_path / "a.HEIC").touch()
    with pytest.raises(UserError, match=r"no images in this directory; .*, and a\.HEIC cannot be read"):
        photos.image_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain ü 服.png", "plain ü 服.png"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("left\u202eright\u2028", r"left\u202eright\u2028"),
    ],
)
def test_names_are_shown_as_one_line_of_text(name, shown):
    assert photos.printable(name) == shown


def test_an_unreadable_image_cannot_forge_a_line(tmp_path):
    path = tmp_path / "a\nb\x1b[2J.png"
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\\nb\\x1b\[2J\.png: cannot read it as an image") as error:
        photos.read_image(path)
    assert str(error.value).isprintable()


# Photographs: drawn articles in the scenes of `drawn`, of which docs/predicting.md says what a net makes.


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, np.ndarray]:
    """Of each scene what the models see of the ten articles, uint8 (10, 28, 28)."""
    folder = tmp_path_factory.mktemp("drawn")
    found: dict[str, list[np.ndarray]] = {}
    for label in drawn.ARTICLES:
        for scene, picture in drawn.scenes(label):
            found.setdefault(scene, []).append(photos.read_image(save(folder / f"{label}-{scene}.png", picture)))
    return {scene: np.stack(images) for scene, images in found.items()}


def test_an_article_fills_the_picture_on_black_whatever_it_lay_on(seen):
    for scene, images in seen.items():
        for label, image in enumerate(images):
            rows, columns = np.flatnonzero(image.max(axis=1) > 12), np.flatnonzero(image.max(axis=0) > 12)
            where = scene, label
            assert max(len(rows), len(columns)) == 28, where
            assert abs(rows[0] - (27 - rows[-1])) <= 1 and abs(columns[0] - (27 - columns[-1])) <= 1, where
            assert image.max() == 255, where
            corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
            assert (np.sort(corners)[:2] == 0).all(), where  # the boot and the bag reach into two
    for scene in ("grey", "shadow", "noise", "margin", "panorama", "cut-out"):
        assert np.abs(seen[scene] - seen["white"].astype(float)).mean() < 12, scene


def nearest_neighbours_right(seen: dict[str, np.ndarray], dataset: fashion_mnist.Dataset) -> int:
    """In how many pictures the train image of the highest correlation is of the article's class."""

    def rows(images: np.ndarray) -> np.ndarray:
        rows = images.reshape(len(images), -1).astype(np.float32)
        rows -= rows.mean(axis=1, keepdims=True)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    train = rows(dataset.train_images)
    nearest = [dataset.train_labels[(rows(images) @ train.T).argmax(axis=1)] for images in seen.values()]
    return int((np.stack(nearest) == np.arange(10)).sum())


def test_drawn_articles_resemble_their_class(seen):
    assert nearest_neighbours_right(seen, fashion_mnist.load("sample")) >= 70  # 45 when they were only fitted in


@pytest.mark.full
def test_drawn_articles_resemble_their_class_in_all_the_data(seen):
    assert nearest_neighbours_right(seen, fashion_mnist.load()) >= 95  # 60 when they were only fitted in


def test_the_side_that_counts_can_be_ordered(tmp_path):
    """White and black pieces on grey: the larger is the article, unless it is said which."""
    picture = PIL.Image.new("L", (200, 200), 128)
    picture.paste(255, (20, 20, 180, 100))
    picture.paste(0, (20, 120, 180, 180))
    path = save(tmp_path / "a.png", picture)
    upper, lower = np.s_[1:13, 3:25], np.s_[19:27, 3:25]
    expected: list[tuple[photos.Invert, tuple, tuple]]
    expected = [("auto", upper, lower), ("no", upper, lower), ("yes", lower, upper)]
    for invert, light, dark in expected:
        image = photos.read_image(path, invert)
        assert image[light].min() > 200 and image[dark].max() == 0, invert


def test_rounded_corners_are_no_cutting_out(tmp_path):
    picture = PIL.Image.new("LA", (280, 280), (180, 255))
    picture.paste((40, 255), (70, 100, 210, 240))
    plain = photos.read_image(save(tmp_path / "a.png", picture))
    for corner in ((0, 0, 30, 30), (250, 250, 280, 280)):
        picture.paste((180, 0), corner)
    np.testing.assert_array_equal(photos.read_image(save(tmp_path / "a.png", picture)), plain)
    assert (plain == 255).all()


def test_specks_are_no_edges(tmp_path):
    picture = PIL.Image.new("L", (280, 280), 240)
    picture.paste(40, (70, 100, 210, 240))
    clean = photos.read_image(save(tmp_path / "a.png", picture))
    picture.paste(0, (3, 3, 8, 8))
    np.testing.assert_array_equal(photos.read_image(save(tmp_path / "a.png", picture)), clean)
    assert (clean > 200).all()


# What is unlike the data.


def test_nothing_in_the_data_is_odd():
    dataset = fashion_mnist.load("sample")
    assert {photos.oddity(image) for image in (*dataset.train_images, *dataset.test_images)} == {""}


@pytest.mark.full
def test_nothing_in_all_the_data_is_odd():
    dataset = fashion_mnist.load()
    assert {photos.oddity(image) for image in (*dataset.train_images, *dataset.test_images)} == {""}


@pytest.mark.parametrize("size", [(28, 28), (300, 300), (300, 400), (40, 20)])
@pytest.mark.parametrize(
    ("colour", "said"),
    [
        ("black", "nearly empty"),
        ("white", "nearly empty"),  # inverted
        ("#505050", "nearly all of one grey"),
        ("#c0d0e0", "nearly all of one grey"),
        ("#00000000", "nearly empty"),
    ],
)
def test_a_picture_of_nothing_is_odd(colour, said, size, tmp_path):
    path = save(tmp_path / "a.png", PIL.Image.new("RGBA", size, colour))
    assert photos.oddity(photos.read_image(path)) == said


def test_a_speck_and_noise_are_odd(article):
    speck = np.zeros((28, 28), np.uint8)
    speck[10:13, 10:13] = 255
    assert photos.oddity(speck) == "nearly empty"
    rng = np.random.default_rng(0)
    for noise in (rng.integers(0, 256, (28, 28)), rng.normal(128, 20, (28, 28)), rng.permuted(article.ravel())):
        assert photos.oddity(noise.reshape(28, 28).astype(np.uint8)) == "noise"


# Bytes of any kind: an image, or a line that says why not.


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_damaged_images_are_read_or_refused(data):
    ending = data.draw(
        st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM", "TGA", "WEBP", "ICO", "JPEG2000"])
    )
    mode = data.draw(st.sampled_from(["L", "RGB"]))
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(784, dtype=np.uint16).astype(np.uint8).reshape(28, 28)).convert(mode).save(
        file, ending
    )
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content))) :]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a"
        path.write_bytes(content)
        try:
            image = photos.read_image(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
        else:
            assert (image.shape, image.dtype) == ((28, 28), np.uint8)
            photos.oddity(image)
