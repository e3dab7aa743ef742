"""Writing and handwritten digits as masks, and where each character lies; draws no picture."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lapilli.geometry import ImageSize
from pebble.digits import digit_scans
from pebble.scene import Digit, Scene, Writing

_FONT_FILES: Final = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
)
_FONT_SIZE: Final = 96  # type is drawn at this size and scaled
BITMAP_FONT: Final = 1 + len(_FONT_FILES)  # Pillow's own without FreeType
BITMAP_POINTS: Final = 11  # its one size
_MARGIN: Final = 4  # pixels around type that is turned
_DIGIT_SIDE: Final = 120


@dataclass(frozen=True, slots=True)
class Glyph:
    """One character and its box in shares of the picture."""

    text: str
    top: float
    left: float
    bottom: float
    right: float


def glyphs(scene: Scene) -> tuple[Glyph, ...]:
    """Every character of the scene's writing, in lower case, or its handwritten digit.

    A tower that is told which character lies under a patch learns to read from far fewer pictures
    than one that is told the word.
    """
    if scene.digit is not None:
        mask, (y, x) = digit_mask(scene.digit, scene.size)
        tall, wide = mask.height / 2 / scene.size.height, mask.width / 2 / scene.size.width
        return (Glyph(str(scene.digit.value), y - tall, x - wide, y + tall, x + wide),)
    return () if scene.writing is None else characters(scene.writing, scene.size)


def characters(writing: Writing, size: ImageSize) -> tuple[Glyph, ...]:
    """Boxes of the characters: their place on the line, turned and scaled as the line is."""
    font = _font(writing.font, writing.points or _FONT_SIZE)
    left, top, right, bottom = font.getbbox(writing.drawn)
    mask, (y, x) = writing_mask(writing, size)
    angle = math.radians(writing.angle)
    margin = 0 if writing.points else _MARGIN
    width, height = math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin
    turned = width * math.cos(angle) + height * abs(math.sin(angle))
    scale = mask.width / turned
    found = []
    for i, character in enumerate(writing.drawn):
        start, end = font.getlength(writing.drawn[:i]), font.getlength(writing.drawn[: i + 1])
        along = margin - left + (start + end) / 2 - width / 2  # from the middle of the line
        middle_x = x + along * math.cos(angle) * scale / size.width
        middle_y = y - along * math.sin(angle) * scale / size.height
        wide = (end - start) / 2 * scale / size.width
        tall = (bottom - top) / 2 * scale / size.height
        box = (middle_y - tall, middle_x - wide, middle_y + tall, middle_x + wide)
        found.append(Glyph(character.lower(), *box))
    return tuple(found)


def _inside(share: tuple[float, float], mask: Image.Image, size: ImageSize) -> tuple[float, float]:
    """Return a centre that keeps the mask inside: `share` 0 puts it at one edge, 1 at the other."""
    room_y = max(size.height - mask.height, 0)
    room_x = max(size.width - mask.width, 0)
    y = (mask.height / 2 + share[0] * room_y) / size.height
    x = (mask.width / 2 + share[1] * room_x) / size.width
    return y, x


@lru_cache(maxsize=256)
def _font(index: int, points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font for 0, the DejaVu fonts of matplotlib, Pillow's bitmap."""
    if index == 0:
        return ImageFont.load_default(points)
    if index == BITMAP_FONT:
        return ImageFont.load_default_imagefont()
    import matplotlib as mpl

    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / _FONT_FILES[(index - 1) % len(_FONT_FILES)]), points)


def type_size(drawn: str, font: int, points: int) -> tuple[float, float]:
    """Height and width of a line of type in pixels."""
    left, top, right, bottom = _font(font, points).getbbox(drawn)
    return float(bottom - top), float(right - left)


def writing_mask(writing: Writing, size: ImageSize) -> tuple[Image.Image, tuple[float, float]]:
    """Ink of the writing, 0 to 255, and where its middle lies (shares of the picture)."""
    font = _font(writing.font, writing.points or _FONT_SIZE)
    left, top, right, bottom = font.getbbox(writing.drawn)
    margin = 0 if writing.points else _MARGIN
    box = (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin)
    canvas = Image.new("L", box, 0)
    ImageDraw.Draw(canvas).text((margin - left, margin - top), writing.drawn, fill=255, font=font)
    if writing.points:
        return canvas, _inside(writing.centre, canvas, size)
    canvas = canvas.rotate(writing.angle, Image.Resampling.BICUBIC, expand=True)
    mask = _fitted(canvas, size, writing.extent)
    return mask, _inside(writing.centre, mask, size)


def digit_mask(digit: Digit, size: ImageSize) -> tuple[Image.Image, tuple[float, float]]:
    """Ink of the handwritten digit, 0 to 255, and where its middle lies (shares of the picture)."""
    scan = np.zeros((12, 10), dtype=np.uint8)
    scan[2:10, 1:9] = digit_scans()[0][digit.index]
    large = Image.fromarray(scan).resize(
        (round(_DIGIT_SIDE * digit.stretch[1]), round(_DIGIT_SIDE * 1.2 * digit.stretch[0])),
        Image.Resampling.BICUBIC,
    )
    large = large.rotate(digit.angle, Image.Resampling.BICUBIC)
    ink = np.asarray(large, dtype=np.float32) / 255.0
    steep = 1.1 + 2.0 * digit.sharpness  # of the step from paper to ink
    ink = np.clip((ink - 0.5) * steep + 0.5, 0, 1)
    canvas = Image.fromarray((ink * 255).astype(np.uint8))
    box = canvas.getbbox() or (0, 0, canvas.width, canvas.height)
    mask = _fitted(canvas.crop(box), size, digit.extent)
    return mask, _inside(digit.centre, mask, size)


def _fitted(mask: Image.Image, size: ImageSize, extent: float) -> Image.Image:
    """Return the mask scaled to fill `extent` of the picture in its tighter direction."""
    scale = extent * min(size.width / mask.width, size.height / mask.height)
    target = (max(round(mask.width * scale), 1), max(round(mask.height * scale), 1))
    return mask.resize(target, Image.Resampling.BICUBIC)
