"""Colours of pebble's world: names, ranges, contrast; knows numbers only, no scene and no Pillow.

A colour name covers a range of hue, saturation and value. The ranges leave gaps (nothing between
orange and yellow is ever drawn), so that a person and the model can always tell which name is
meant.
"""

import colorsys
import math
from typing import Final

import numpy as np

Rgb = tuple[int, int, int]

# name -> (hue in degrees, may be negative), saturation, value; low and high each
_RANGES: Final = {
    "red": ((-7.0, 5.0), (0.82, 1.0), (0.75, 1.0)),
    "orange": ((26.0, 38.0), (0.88, 1.0), (0.93, 1.0)),
    "yellow": ((53.0, 60.0), (0.75, 1.0), (0.93, 1.0)),
    "green": ((105.0, 145.0), (0.65, 1.0), (0.45, 0.95)),
    "blue": ((214.0, 240.0), (0.75, 1.0), (0.7, 1.0)),
    "purple": ((278.0, 300.0), (0.6, 1.0), (0.48, 0.8)),
    "black": ((0.0, 360.0), (0.0, 0.2), (0.0, 0.12)),
    "white": ((0.0, 360.0), (0.0, 0.03), (0.95, 1.0)),
}
COLOURS: Final = tuple(_RANGES)

# tone -> how often, saturation, value
_TONES: Final = {
    "light": (0.52, (0.0, 0.14), (0.88, 1.0)),
    "middle": (0.2, (0.0, 0.18), (0.62, 0.76)),
    "dark": (0.28, (0.0, 0.4), (0.06, 0.2)),
}
MIN_CONTRAST: Final = 40.0  # CIE76 distance between an object and its background
MIN_LIGHTNESS: Final = (
    20.0  # L* between thin strokes and their background: yellow on white cannot be read
)
_ATTEMPTS: Final = 6
_WHITE_D65: Final = (0.95047, 1.0, 1.08883)
_TO_XYZ: Final = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)


def _from_hsv(hue_degrees: float, saturation: float, value: float) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb((hue_degrees % 360.0) / 360.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def shade(colour: str, rng: np.random.Generator) -> Rgb:
    """One random shade of a named colour."""
    hue, saturation, value = _RANGES[colour]
    return _from_hsv(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))


def ground(rng: np.random.Generator) -> tuple[Rgb, Rgb]:
    """Two colours of one tone for a background; the second is the far end of a gradient."""
    names = list(_TONES)
    tone = names[int(rng.choice(len(names), p=[_TONES[name][0] for name in names]))]
    if tone == "light" and rng.random() < 0.35:
        return (255, 255, 255), (255, 255, 255)
    _, saturation, value = _TONES[tone]
    hue = rng.uniform(0.0, 360.0)
    near = _from_hsv(hue, rng.uniform(*saturation), rng.uniform(*value))
    far = _from_hsv(hue + rng.uniform(-40.0, 40.0), rng.uniform(*saturation), rng.uniform(*value))
    return near, far


def lab(rgb: Rgb) -> tuple[float, float, float]:
    """CIE L*a*b* of an sRGB colour (D65)."""
    red, green, blue = (_linear(value / 255) for value in rgb)
    x, y, z = (
        _cube_root((row[0] * red + row[1] * green + row[2] * blue) / white)
        for row, white in zip(_TO_XYZ, _WHITE_D65, strict=True)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


def _cube_root(ratio: float) -> float:
    return float(ratio ** (1 / 3)) if ratio > 216 / 24389 else (24389 / 27 * ratio + 16) / 116


def contrast(one: Rgb, other: Rgb) -> float:
    """CIE76 distance of two colours; about 2 is just visible, 100 is black to white."""
    return math.dist(lab(one), lab(other))


def visible_shade(
    colour: str, grounds: tuple[Rgb, ...], rng: np.random.Generator, *, strokes: bool = False
) -> Rgb | None:
    """Return a shade of the colour that stands out from every ground, or None where none was found.

    Args:
        colour: one of `COLOURS`.
        grounds: the colours of the background.
        rng: where the shade comes from.
        strokes: for thin lines, which must differ in lightness too.
    """
    for _ in range(_ATTEMPTS):
        rgb = shade(colour, rng)
        if all(_stands_out(rgb, one, strokes) for one in grounds):
            return rgb
    return None


def _stands_out(rgb: Rgb, back: Rgb, strokes: bool) -> bool:
    front, behind = lab(rgb), lab(back)
    if strokes and abs(front[0] - behind[0]) < MIN_LIGHTNESS:
        return False
    return math.dist(front, behind) >= MIN_CONTRAST
