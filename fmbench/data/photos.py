"""Any image as the data set shows an article: grey, 28 x 28, light on black."""

import io
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageChops
import PIL.ImageOps

from fmbench.errors import UserError

# Not all that Pillow can open: EPS, for one, is a program that it would run.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
SIZE = (28, 28)
Invert = Literal["auto", "yes", "no"]


def read_image(path: Path, invert: Invert = "auto") -> np.ndarray:
    """Reads an image as the models see it, uint8 (28, 28).

    A grey image of 28 x 28 stays as it is, unless it is inverted. Others become grey by their luminance, turned as
    their EXIF orientation says, and are reduced or enlarged to fit, centred between black margins. What is
    transparent becomes black.

    Args:
        path: '-' is standard input.
        invert: Whether dark becomes light; 'auto' inverts images with a light border.

    Raises:
        UserError: If the file is missing or no image.
    """
    try:
        with PIL.Image.open(
            io.BytesIO(sys.stdin.buffer.read()) if str(path) == "-" else path, formats=_formats()
        ) as image:
            grey, opacity = _grey_and_opacity(PIL.ImageOps.exif_transpose(image))
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"{path}: cannot read it as an image; the formats are {', '.join(_formats())}.") from error
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read it as an image ({reason}).") from error

    black = PIL.Image.new("L", grey.size, 0)
    # The data set's articles were photographed on white and inverted: so is one that was cut out.
    on_white = PIL.Image.composite(grey, PIL.ImageOps.invert(black), opacity)
    if invert == "yes" or (invert == "auto" and _has_light_border(on_white)):
        article = PIL.ImageOps.invert(on_white)
    else:
        article = PIL.Image.composite(grey, black, opacity)
    return np.array(PIL.ImageOps.pad(article, SIZE, PIL.Image.Resampling.LANCZOS, color=0))


def image_files(directory: Path) -> list[Path]:
    """The directory's files with an image's ending, sorted.

    Raises:
        UserError: If there are none, or the directory cannot be read.
    """
    formats = _formats()
    endings = {ending for ending, name in PIL.Image.registered_extensions().items() if name in formats}
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix.lower() in endings)
    except OSError as error:
        raise UserError(f"{directory}: cannot read the directory ({error.strerror}).") from error
    if not files:
        raise UserError(f"{directory}: no images in this directory; their names end in .png, .jpg and the like.")
    return files


def _formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    PIL.Image.init()
    return [name for name in FORMATS if name in PIL.Image.OPEN]


def _grey_and_opacity(image: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Two images of mode 'L': the luminance, and 255 where it is opaque."""
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        grey = PIL.Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return grey, PIL.Image.new("L", grey.size, 255)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("L"), image.getchannel("A")
    return image.convert("L"), PIL.Image.new("L", image.size, 255)


def _has_light_border(grey: PIL.Image.Image) -> bool:
    """Whether the outermost pixels, after reduction to 28 x 28, are lighter than middle grey on average.

    Of the 70,000 images of the data set none is, and of their negatives all are. Reduction keeps a thin frame, or
    the noise of a photograph, from deciding.
    """
    pixels = np.asarray(grey.resize(SIZE, PIL.Image.Resampling.BOX))
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return bool(border.mean() > 127.5)
