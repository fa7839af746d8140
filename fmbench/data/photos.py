"""Any image as the data set shows an article: grey, 28 x 28, light on black."""

import contextlib
import io
import os
import re
import select
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import scipy.ndimage

from fmbench.errors import UserError

# Not all that Pillow can open: EPS, for one, is a program that it would run.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# Of pictures that cannot be read here: phones', drawings, raw files of cameras.
OTHER_ENDINGS = re.compile(
    r".*\.(heic|heif|hif|jxl|jxr|eps|svg|psd|xcf|pcx|dds|exr|hdr|icns|qoi|dng|cr2|cr3|nef|arw|orf|raf|rw2|pef|srw)",
    re.IGNORECASE | re.DOTALL,
)
SIZE = (28, 28)
MOST_PIXELS = 2**29  # some 540 million, of which Pillow holds up to four bytes each
MOST_OTHER_BYTES = 2**27  # of what a file holds beside the pixels; Pillow holds up to four times as many
MOST_PIPED_BYTES = 2**29
IDLE_SECONDS = 60  # without a byte, before standard input is given up
DEPTHS = (8, 10, 12, 14, 16)  # bits in which cameras and scanners count grey levels
STRIP_PIXELS = 2**22
CLOSE = 0.05 * 255  # to the ground, in grey levels: it is trimmed away
FINDING_SIZE = 8 * SIZE[0]  # longest side of the picture in which the article is looked for
Invert = Literal["auto", "yes", "no"]


def read_image(picture: Path | io.BytesIO, invert: Invert = "auto") -> np.ndarray:
    """Reads an image as the models see it, uint8 (28, 28).

    A grey image of 28 x 28 stays as it is, unless it is inverted. Others become grey by their luminance, turned as
    their EXIF orientation says, and then what `prepare` makes of a photograph.

    Grey levels stored with more than 8 bits are read by their values, whatever else could be stored: as counted in
    the fewest of 8, 10, 12, 14 and 16 bits that hold the largest, or, if they are fractions, from 0 to 1.

    Args:
        picture: A file's path, or '-' for standard input; or what a file holds.
        invert: Whether dark becomes light; 'auto' inverts where the article is darker than its ground.

    Raises:
        UserError: If the file is missing, no image, too large, or has grey levels of no such range.
    """
    name = "the picture" if isinstance(picture, io.BytesIO) else printable(picture)
    try:
        with _decoding(), _open(picture) as file, PIL.Image.open(file, formats=_formats()) as image:
            file.allowance += 8 * image.width * image.height
            image.draft(image.mode, (SIZE[0] * 16, SIZE[1] * 16))  # a JPEG is reduced while it is read
            on_white, on_black = _grey(image)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"{name}: cannot read it as an image; the formats are {', '.join(_formats())}.") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{name}: cannot read it as an image of more than {MOST_PIXELS // 10**6} million pixels; reduce it."
        ) from error
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{name}: cannot read it as an image ({printable(reason)}).") from error

    if on_white.size == SIZE:
        is_dark = invert == "yes" or (invert == "auto" and _has_light_border(on_white))
        return np.array(PIL.ImageOps.invert(on_white) if is_dark else on_black)
    return prepare(on_white, on_black, invert)


def prepare(on_white: PIL.Image.Image, on_black: PIL.Image.Image, invert: Invert = "auto") -> np.ndarray:
    """Makes of a photograph what the data set would show: one article, light on black, as large as fits.

    Follows section 2 of Xiao, Rasul and Vollgraf, "Fashion-MNIST" (arXiv:1708.07747), whose pictures were of
    single articles on white: (1) edges within 5 % of the corners' colour are trimmed; (2) the longest side becomes
    28; (3) a Gaussian of radius 1 sharpens; (4) the shorter side is extended, the article in the middle; (5) the
    levels are negated; (6) they become 8 bits of grey. In the files the lightest pixel is 254 or 255: levels were
    extended, too. Where a photograph is on no pure white, the steps are meant, not the letter: "the corners'
    colour" is a plane through the levels of the border, which may be unevenly lit; its noise widens the 5 %;
    specks of less than a fiftieth of the article are no edges; levels are differences from that ground, of
    whichever sign has more of them, so that a light article on dark or grey comes out light as well. Step 3 mends
    what the authors' picking of single pixels costs; here pixels are averaged, and sharpened ones are recognised
    worse.

    Args:
        on_white: Mode 'L', on white where it is transparent.
        on_black: The same picture, on black there.
        invert: 'yes' takes what is darker than the ground, 'no' what is lighter; 'auto' the more of the two.

    Returns:
        uint8 (28, 28). A picture that is all ground has nothing to trim, and is fitted in as it is.
    """
    levels, cut_out = np.asarray(on_white, np.float32), np.asarray(on_black, np.float32)
    square = max(1, -(-max(levels.shape) // FINDING_SIZE))
    opaque = np.asarray(PIL.Image.fromarray(1 - (levels - cut_out) / 255).reduce(square)) > 0.5
    if np.concatenate([opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]]).mean() < 0.5:
        darker, lighter = 255 - levels, cut_out
        strays, found = 0.0, opaque
    else:  # a photograph, perhaps with rounded corners
        ground, strays = _ground(np.asarray(on_white.reduce(square), np.float32), levels.shape)
        darker, lighter = ground - levels, levels - ground
        found = np.abs(np.asarray(PIL.Image.fromarray(darker).reduce(square))) > max(CLOSE, 4 * strays)
        found &= opaque
    box = _box(found)
    if box is None:
        article = PIL.ImageOps.invert(on_white) if invert == "yes" or levels.mean() > 127.5 else on_black
        return np.array(PIL.ImageOps.pad(article, SIZE, PIL.Image.Resampling.LANCZOS, color=0))

    rows, columns = (slice(side.start * square, side.stop * square) for side in box)
    height, width = darker[rows, columns].shape
    longest = max(height, width)
    size = max(1, round(width * SIZE[0] / longest)), max(1, round(height * SIZE[1] / longest))
    of_sign = {}
    for sign, differences in (("yes", darker), ("no", lighter)):
        part = PIL.Image.fromarray(differences[rows, columns]).resize(size, PIL.Image.Resampling.BOX)
        of_sign[sign] = np.maximum(np.asarray(part) - 3 * strays, 0)
    if invert == "auto":
        invert = "yes" if of_sign["yes"].sum() >= of_sign["no"].sum() else "no"
    light = of_sign[invert]
    grey = PIL.Image.fromarray(np.rint(light * (255 / max(1.0, light.max()))).astype(np.uint8))
    return np.array(PIL.ImageOps.pad(grey, SIZE, color=0))


def _ground(levels: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The ground that an article lies on, told by the border, of which it may cover less than half.

    Args:
        levels: Grey levels of the picture, reduced, float32 (height, width).
        shape: Of the picture itself.

    Returns:
        The ground's levels there, a plane, float32 of that shape, and the standard deviation of the reduced
        picture's border from it.
    """
    height, width = levels.shape
    y, x = np.mgrid[:height, :width]
    band = max(1, min(levels.shape) // SIZE[0])
    is_border = (np.minimum(y, height - 1 - y) < band) | (np.minimum(x, width - 1 - x) < band)
    border = levels[is_border]
    terms = np.stack([np.ones(len(border)), (x[is_border] + 0.5) / width, (y[is_border] + 0.5) / height], axis=1)
    plane = np.array([np.median(border), 0, 0])
    for _ in range(5):  # each time without what is far from the last
        distances = np.abs(border - terms @ plane)
        near = distances <= max(3 * np.median(distances), 2)
        plane = np.linalg.lstsq(terms[near], border[near])[0]
    strays = 1.4826 * float(np.median(np.abs(border - terms @ plane)))  # of normal noise, its standard deviation
    across = plane[1] * (np.arange(shape[1]) + 0.5) / shape[1]
    down = plane[2] * (np.arange(shape[0]) + 0.5) / shape[0]
    return (plane[0] + across[None, :] + down[:, None]).astype(np.float32), strays


def _box(found: np.ndarray) -> tuple[slice, slice] | None:
    """Rows and columns from the first to the last pixel found, bool (height, width), without specks."""
    pieces, number = scipy.ndimage.label(found, np.ones((3, 3)))
    if not number:
        return None
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return scipy.ndimage.find_objects((sizes >= sizes.max() / 50)[pieces].astype(np.int8))[0]


def oddity(image: np.ndarray) -> str:
    """Why an image, as `read_image` returns it, looks unlike every image of the data set; '' if it does not.

    Of the 70,000 images all have 19 pixels or more above 32, grey levels from 0 to 254 or 255, and, with their
    neighbours to the right and below, a correlation of 0.24 or more. Noise has none.
    """
    pixels = image.astype(np.float32)
    if (pixels > 32).sum() < 16:
        return "nearly empty"
    rows, columns = pixels.any(axis=1), pixels.any(axis=0)
    if (
        np.ptp(pixels[rows.argmax() : 28 - rows[::-1].argmax(), columns.argmax() : 28 - columns[::-1].argmax()])
        < 16
    ):
        return "nearly all of one grey"
    deviations = pixels - pixels.mean()
    products = (deviations[:, 1:] * deviations[:, :-1]).mean() + (deviations[1:] * deviations[:-1]).mean()
    return "noise" if products / 2 < 0.2 * pixels.var() else ""


def image_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """The directory's files with an image's ending, sorted: those to be read, and those of formats that cannot be.

    Left out are the companions that macOS writes beside files on foreign disks, `._a.png` beside `a.png`.

    Raises:
        UserError: If there are none to be read, or the directory cannot be read.
    """
    formats = _formats()
    endings = {ending for ending, name in PIL.Image.registered_extensions().items() if name in formats}
    try:
        paths = sorted(path for path in directory.iterdir() if not path.name.startswith("._"))
    except OSError as error:
        raise UserError(f"{printable(directory)}: cannot read the directory ({error.strerror}).") from error
    files = [path for path in paths if path.suffix.lower() in endings]
    others = [path for path in paths if OTHER_ENDINGS.fullmatch(path.name)]
    if not files:
        raise UserError(
            f"{printable(directory)}: no images in this directory; their names end in .png, .jpg and the like"
            f"{f', and {printable(others[0].name)} cannot be read' if others else ''}."
        )
    return files, others


def printable(text: object) -> str:
    r"""A name as one line of a terminal can show it: '\n' for a line feed, '\xff' for a byte that is no text."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1].replace(r"\udc", r"\x")
        for character in str(text)
    )


class _File(io.BufferedReader):
    """A file of which no more is read than a picture has use for."""

    allowance = MOST_OTHER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        most = self.allowance + 1
        content = super().read(most if size is None or size < 0 else min(size, most))
        self.allowance -= max(len(content), 64)  # as much time as a single byte takes
        if self.allowance < 0:
            raise UserError(
                f"cannot read it as an image, it has {MOST_OTHER_BYTES // 2**20} MB that are no pixels."
            )
        return content


def _open(path: Path | io.BytesIO) -> _File:
    """Opens a file that is one, or all of standard input, which must have an end."""
    if isinstance(path, io.BytesIO):
        return _File(path)
    if str(path) == "-":
        return _File(_standard_input())
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "directory" if stat.S_ISDIR(mode) else "pipe or device"
        raise UserError(f"cannot read it as an image, it is a {kind}; name a file, or pipe one into -.")
    return _File(io.FileIO(path))


def _standard_input() -> io.BytesIO:
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("standard input is no image; pipe one into it.")
    content, descriptor = io.BytesIO(), sys.stdin.fileno()
    while select.select([descriptor], [], [], IDLE_SECONDS)[0]:
        if not (chunk := os.read(descriptor, 2**20)):
            content.seek(0)
            return content
        content.write(chunk)
        if content.tell() > MOST_PIPED_BYTES:
            raise UserError(f"standard input has more than {MOST_PIPED_BYTES // 2**20:,} MB; name a file.")
    raise UserError(f"standard input gave nothing for {IDLE_SECONDS} seconds.")


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Pillow with our limit of pixels, beyond which it raises, and without its warnings of harmless damage."""
    most_pixels = PIL.Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        PIL.Image.MAX_IMAGE_PIXELS = MOST_PIXELS
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = most_pixels


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]


def _grey(image: PIL.ImageFile.ImageFile) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """The luminance, of mode 'L' and turned upright: on white where it is transparent, and on black.

    The data set's articles were photographed on white and inverted: so is one that was cut out.

    It is made of strips, and where the image is far larger than 28 x 28 of the means of squares, so that there is
    no second image of its size in memory.
    """
    if max(image.size) > 28 * min(image.size):
        raise UserError(f"cannot read {image.width} x {image.height} pixels as an article; cut its image out.")
    deep_colour = image.tile and ";16" in str(image.tile[0][3]) and len(image.getbands()) > 1
    image.load()
    largest = _largest_level(image) if image.mode[0] in "IF" else None
    square = max(1, max(image.size) // (SIZE[0] * 32))
    reduced = -(-image.width // square), -(-image.height // square)
    on_white, on_black = PIL.Image.new("L", reduced), PIL.Image.new("L", reduced)
    lightest = 0
    for top, strip in _strips(image, square):
        if largest is not None:
            scaled = np.asarray(strip).astype(np.float32) * (255 / largest)
            grey, opacity = PIL.Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8)), None
        elif image.has_transparency_data:
            strip = strip.convert("RGBA")
            grey, opacity = strip.convert("L"), strip.getchannel("A")
        else:
            grey, opacity = strip.convert("L"), None
        lightest = max(lightest, int(np.asarray(grey).max()))
        for whole, background in ((on_white, 255), (on_black, 0)):
            plain = PIL.Image.new("L", grey.size, background)
            part = PIL.Image.composite(grey, plain, opacity) if opacity else grey
            whole.paste(part.reduce(square) if square > 1 else part, (0, top // square))
    if deep_colour and lightest < 64:
        raise UserError(
            "cannot read its colours: of their 16 bits the upper are empty, and only they are read; save 8."
        )
    orientation = PIL.Image.Exif()
    orientation[0x0112] = image.getexif().get(0x0112, 1)
    for whole in (on_white, on_black):
        whole.info["exif"] = orientation.tobytes()
    return PIL.ImageOps.exif_transpose(on_white), PIL.ImageOps.exif_transpose(on_black)


def _strips(image: PIL.Image.Image, square: int) -> Iterator[tuple[int, PIL.Image.Image]]:
    """The image from top to bottom in strips of some `STRIP_PIXELS`, with the row each begins at."""
    rows = max(1, STRIP_PIXELS // image.width // square) * square
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _largest_level(image: PIL.Image.Image) -> float:
    """The number that stands for white in an image of mode 'I...' or 'F', told by the numbers in it.

    Raises:
        UserError: If they fit no range, or more than one.
    """
    lows, highs, whole = [], [], True
    for _, strip in _strips(image, 1):
        numbers = np.asarray(strip)
        lows.append(numbers.min())
        highs.append(numbers.max())
        whole = whole and (numbers.dtype.kind != "f" or bool((numbers == np.rint(numbers)).all()))
    low, high = float(np.min(lows)), float(np.max(highs))
    if image.mode == "F" and low >= 0 and high <= 1:
        return 1
    for depth in DEPTHS:
        # Fractions a little above 1 may be of 0..1 or of 0..255.
        if low >= 0 and high < 2**depth and (whole or high >= 16):
            return 2**depth - 1
    raise UserError(
        f"cannot read its grey levels, which go from {low:g} to {high:g}; expected whole numbers of 8 to 16 bits, "
        "or fractions from 0 to 1."
    )


def _has_light_border(grey: PIL.Image.Image) -> bool:
    """Whether the outermost pixels, after reduction to 28 x 28, are lighter than middle grey on average.

    Of the 70,000 images of the data set none is, and of their negatives all are. Reduction keeps a thin frame, or
    the noise of a photograph, from deciding.
    """
    pixels = np.asarray(grey.resize(SIZE, PIL.Image.Resampling.BOX))
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return bool(border.mean() > 127.5)
