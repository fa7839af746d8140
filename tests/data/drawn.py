"""Pictures that are drawn: an article of each class in scenes as people photograph them, and what is no article.

python tests/data/drawn.py FOLDER        writes them all, <class>-<scene>.png
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import PIL.ImageFont

SIDE = 400  # of an article's own picture, in which it reaches from 20 to 380

# Of each class: what is filled with cloth, in order; a number is what the cloth's lightness is multiplied by.
Shape = tuple[float, list[tuple[int, int]]]
ARTICLES: dict[int, list[Shape]] = {
    0: [  # T-shirt
        (1, [(120, 35), (165, 25), (200, 45), (235, 25), (280, 35), (280, 375), (120, 375)]),
        (0.85, [(120, 35), (45, 105), (85, 165), (122, 130)]),
        (0.85, [(280, 35), (355, 105), (315, 165), (278, 130)]),
    ],
    1: [  # trouser
        (1, [(130, 20), (270, 20), (280, 120), (270, 380), (210, 380), (202, 150), (198, 150), (190, 380),
             (130, 380), (120, 120)]),
        (0.7, [(130, 20), (270, 20), (271, 40), (129, 40)]),
    ],
    2: [  # pullover
        (1, [(130, 35), (170, 25), (200, 40), (230, 25), (270, 35), (285, 370), (115, 370)]),
        (0.85, [(130, 35), (85, 70), (45, 350), (85, 360), (122, 180)]),
        (0.85, [(270, 35), (315, 70), (355, 350), (315, 360), (278, 180)]),
        (0.7, [(115, 350), (285, 350), (285, 370), (115, 370)]),
    ],
    3: [  # dress, without sleeves
        (1, [(165, 20), (180, 60), (220, 60), (235, 20), (250, 25), (250, 100), (235, 160), (290, 380), (110, 380),
             (165, 160), (150, 100), (150, 25)]),
        (0.7, [(165, 152), (235, 152), (237, 166), (163, 166)]),
    ],
    4: [  # coat: open collar, a line of the closing, pockets
        (1, [(135, 30), (180, 20), (220, 20), (265, 30), (285, 380), (115, 380)]),
        (0.85, [(135, 30), (90, 60), (60, 330), (95, 340), (126, 180)]),
        (0.85, [(265, 30), (310, 60), (340, 330), (305, 340), (274, 180)]),
        (0.5, [(180, 20), (220, 20), (202, 120), (202, 380), (196, 380), (196, 120)]),
        (0.6, [(135, 250), (175, 240), (175, 250), (135, 260)]),
        (0.6, [(265, 250), (225, 240), (225, 250), (265, 260)]),
    ],
    5: [  # sandal: a sole, a heel, straps
        (0.8, [(20, 250), (120, 265), (250, 230), (330, 150), (380, 150), (380, 270), (355, 270), (345, 190),
             (270, 260), (120, 285), (20, 270)]),
        (1, [(60, 250), (110, 170), (150, 175), (110, 262)]),
        (1, [(335, 155), (310, 90), (370, 85), (378, 152), (362, 152), (355, 105), (328, 108), (350, 155)]),
    ],
    6: [  # shirt: collar, buttons' line, sleeves down
        (1, [(130, 35), (175, 25), (200, 60), (225, 25), (270, 35), (280, 370), (120, 370)]),
        (0.85, [(130, 35), (80, 80), (60, 330), (100, 335), (126, 180)]),
        (0.85, [(270, 35), (320, 80), (340, 330), (300, 335), (274, 180)]),
        (0.6, [(197, 60), (203, 60), (203, 370), (197, 370)]),
        (0.7, [(175, 25), (200, 60), (180, 90), (150, 35)]),
        (0.7, [(225, 25), (200, 60), (220, 90), (250, 35)]),
    ],
    7: [  # sneaker
        (1, [(20, 250), (30, 170), (80, 160), (110, 190), (180, 160), (250, 210), (350, 225), (378, 262),
             (380, 275), (20, 275)]),
        (0.5, [(20, 262), (380, 262), (380, 280), (20, 280)]),
        (0.6, [(150, 175), (180, 160), (250, 210), (225, 215)]),
    ],
    8: [  # bag
        (1, [(40, 170), (360, 170), (375, 350), (25, 350)]),
        (0.8, [(100, 170), (120, 80), (160, 55), (240, 55), (280, 80), (300, 170), (280, 170), (264, 92),
             (235, 73), (165, 73), (136, 92), (120, 170)]),
        (0.7, [(40, 170), (360, 170), (340, 240), (60, 240)]),
    ],
    9: [  # ankle boot
        (1, [(230, 40), (360, 40), (365, 200), (375, 330), (20, 340), (25, 290), (120, 250), (215, 190)]),
        (0.5, [(20, 335), (270, 335), (280, 335), (378, 330), (380, 365), (290, 365), (280, 350), (20, 352)]),
        (0.7, [(255, 60), (262, 60), (258, 200), (250, 200)]),
    ],
}  # fmt: skip


def article(label: int) -> tuple[np.ndarray, np.ndarray]:
    """Lightness of the cloth, float (SIDE, SIDE), 1 where it is unshaded, and how much of each pixel it covers."""
    large = 2 * SIDE
    cloth, cover = PIL.Image.new("F", (large, large), 1), PIL.Image.new("L", (large, large), 0)
    for lightness, polygon in ARTICLES[label]:
        doubled = [(2 * x, 2 * y) for x, y in polygon]
        PIL.ImageDraw.Draw(cloth).polygon(doubled, fill=lightness)
        PIL.ImageDraw.Draw(cover).polygon(doubled, fill=255)
    small = (SIDE, SIDE)
    folds = 1 + 0.06 * np.sin(np.arange(SIDE) / 17 + 0.8 * np.sin(np.arange(SIDE)[:, None] / 60))
    shaded = np.asarray(cloth.resize(small, PIL.Image.Resampling.BOX)) * folds
    return shaded, np.asarray(cover.resize(small, PIL.Image.Resampling.BOX)) / 255


def scenes(label: int) -> Iterator[tuple[str, PIL.Image.Image]]:
    """An article as it may be photographed: name of the scene, and picture."""
    cloth, cover = article(label)
    rng = np.random.default_rng(label)

    def on(ground: float | np.ndarray, lightness: float) -> np.ndarray:
        return cover * lightness * cloth + (1 - cover) * ground

    def padded(picture: np.ndarray, *margins: int, ground: float) -> np.ndarray:
        top, bottom, left, right = margins
        return np.pad(picture, ((top, bottom), (left, right)), constant_values=ground)

    slope = 215 - 40 * np.linspace(0, 1, SIDE) + np.zeros((SIDE, 1))
    grain = rng.normal(0, 10, (SIDE, SIDE))
    pictures = {
        "white": on(255, 90),
        "grey": on(170, 70),
        "shadow": on(slope, 70),
        "noise": on(190, 70) + grain,
        "margin": padded(on(235, 80), 300, 500, 600, 400, ground=235),
        "panorama": padded(on(225, 80), 20, 20, 300, 1500, ground=225),
        "dark": on(30, 190),
        "light-on-grey": on(165, 245),
        "light-on-light": on(248, 215),
    }
    for name, levels in pictures.items():
        yield name, PIL.Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))
    red = np.stack([on(240, 170), on(238, 40), on(230, 50)], axis=-1)
    yield "red", PIL.Image.fromarray(np.rint(red).clip(0, 255).astype(np.uint8))
    for name, lightness in (("cut-out", 80), ("light-cut-out", 235)):
        layers = [lightness * cloth] * 3 + [255 * cover]
        cut = np.pad(np.stack(layers, axis=-1), ((50, 50), (150, 150), (0, 0)))
        yield name, PIL.Image.fromarray(np.rint(cut).clip(0, 255).astype(np.uint8), "RGBA")


def no_articles() -> Iterator[tuple[str, PIL.Image.Image]]:
    """Letters, digits and signs, black on white, and noise of several grains."""
    font = PIL.ImageFont.load_default(280)
    for sign in "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ?&":
        picture = PIL.Image.new("L", (SIDE, SIDE), 255)
        PIL.ImageDraw.Draw(picture).text((SIDE // 2, SIDE // 2), sign, fill=0, font=font, anchor="mm")
        yield f"sign-{sign}", picture
    rng = np.random.default_rng(0)
    for grain in (1, 2, 4, 7, 14):
        for number in range(4):
            levels = rng.integers(0, 256, (28 // grain, 28 // grain), dtype=np.uint8)
            yield (
                f"noise-{grain}-{number}",
                PIL.Image.fromarray(np.kron(levels, np.ones((grain, grain), np.uint8))),
            )
    for level in (0, 60, 128, 200, 255):
        yield f"plain-{level}", PIL.Image.new("L", (300, 200), level)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for one in ARTICLES:
        for scene, image in scenes(one):
            image.save(folder / f"{one}-{scene}.png")
    for name, image in no_articles():
        image.save(folder / f"no-{name}.png")
