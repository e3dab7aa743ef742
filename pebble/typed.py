"""Type as a person's program draws it: a font at a size in points, anywhere in a picture.

The words and numbers of sample.py fill their picture, and their letters are drawn large and scaled.
Here Pillow sets them at the size that they have in the picture, on paper of any colour, in
pictures of the sizes that people choose (200 x 100, 640 x 480), down to type that is too small to
be read once the picture has become 128 x 128 pixels. Knows where the world of scenes is widened,
`wide_scene`; no pixels.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from lapilli.geometry import ImageSize
from pebble.glyphs import BITMAP_FONT, BITMAP_POINTS, characters, type_size
from pebble.palette import COLOURS, Rgb, shade, visible_shade
from pebble.reference import Rng, pick
from pebble.sample import MAX_SIDE, NUM_FONTS, sample_scene
from pebble.scene import WORDS, Background, Scene, Writing

TYPED_SHARE: Final = 0.3  # of the scenes that pebble is trained on
_CROWDED_SHARE: Final = 0.6  # of the crowds
_CROWD: Final = 18  # words and numbers that are tried, of which some find no room
_CROWD_POINTS: Final = (13.5, 36.0)  # in 128 pixels
# Points in a picture of 128 pixels. Type that is set smaller than READABLE is too small to be read;
# a tenth of all type is very small, the rest has any size from _SMALLEST up.
READABLE: Final = 14.0
_TINY: Final = (4.0, 7.5)
_SMALLEST: Final = 9.0
_SIDE: Final = 128  # of the picture that the model sees
_SMALL_SHARE: Final = 0.1
_SMALLEST_TYPE: Final = 8  # points of a typeface that people still choose
_DEFAULT_FONT: Final = 0.55  # chance of Pillow's own typeface
_BITMAP: Final = 0.12  # chance of the bitmap that Pillow has where no FreeType is
_FILLS: Final = (0.96, 0.92)  # of width and height that a line may take
_SIZES: Final = (
    (200, 100), (200, 100), (300, 100), (100, 100), (128, 128), (160, 80), (200, 200), (224, 224),
    (256, 256), (256, 128), (320, 240), (400, 200), (400, 300), (512, 512), (640, 480), (336, 336),
)  # fmt: skip
_BITMAP_SIZES: Final = ((40, 20), (64, 32), (60, 60), (64, 64), (80, 40), (100, 50), (120, 60))
_GAP: Final = 0.02  # of the picture, between two lines of a crowd
_TEXTURED: Final = 0.2
_WHITE: Final = 0.5
_BLACK: Final = 0.14


def wide_scene(seed: int, *, crowds: bool = False) -> Scene:
    """Return the scene of a seed in the world that pebble is trained on.

    Args:
        seed: any non-negative integer; the same seed gives the same scene.
        crowds: see `sample_scene`.
    """
    share = _CROWDED_SHARE if crowds else TYPED_SHARE
    if np.random.default_rng([seed, 37]).random() >= share:
        return sample_scene(seed, crowds=crowds)
    return crowded_type(seed) if crowds else typed_scene(seed)


def typed_scene(seed: int) -> Scene:
    """Return a word or a number in type, of any size that fits its picture."""
    rng = np.random.default_rng([seed, 41])
    base = sample_scene(seed, "writing")
    while True:
        text, drawn = _text(rng)
        is_bitmap = rng.random() < _BITMAP
        size = _picture_size(rng, is_bitmap=is_bitmap)
        font = BITMAP_FONT if is_bitmap else _typeface(rng)
        points = _points(rng, font, drawn, size)
        if points is not None:
            break
    background = _paper(rng, base.background)
    colour, rgb = _ink(rng, background)
    writing = Writing(
        text=text,
        drawn=drawn,
        colour=colour,
        rgb=rgb,
        font=font,
        extent=0.0,
        centre=(0.5, 0.5) if rng.random() < 0.35 else (float(rng.random()), float(rng.random())),
        angle=0.0,
        points=points,
        is_small=_model_points(points, size) < READABLE,
    )
    quality = base.finish.jpeg_quality
    quality = int(rng.integers(80, 98)) if quality is not None and rng.random() < 0.6 else None
    finish = replace(base.finish, jpeg_quality=quality, blur=0.0)
    return replace(base, size=size, background=background, finish=finish, writing=writing)


def crowded_type(seed: int) -> Scene:
    """Several words and numbers of readable size in one picture, none over another.

    Pebble is asked about no such scene; its tower reads small type from far fewer pictures where
    each one shows many characters.
    """
    rng = np.random.default_rng([seed, 59])
    base = sample_scene(seed, "writing")
    size = _picture_size(rng, is_bitmap=False)
    background = _paper(rng, base.background)
    found: list[Writing] = []
    taken: list[tuple[float, float, float, float]] = []
    for _ in range(_CROWD):
        one = _crowd_member(rng, size, background)
        box = _box(one, size)
        if box[2] <= 1 and box[3] <= 1 and not any(_overlap(box, other) for other in taken):
            found.append(one)
            taken.append(box)
    if not found:
        return typed_scene(seed)
    finish = replace(base.finish, blur=0.0)
    scene = replace(base, size=size, background=background, finish=finish)
    return replace(scene, writing=found[0], more=tuple(found[1:]))


def _crowd_member(rng: Rng, size: ImageSize, background: Background) -> Writing:
    text, drawn = _text(rng)
    low, high = _CROWD_POINTS
    points = float(np.exp(rng.uniform(np.log(low), np.log(high)))) * max(size) / _SIDE
    colour, rgb = _ink(rng, background)
    return Writing(
        text=text,
        drawn=drawn,
        colour=colour,
        rgb=rgb,
        font=_typeface(rng),
        extent=0.0,
        centre=(float(rng.random()), float(rng.random())),
        angle=0.0,
        points=max(round(points), 1),
        is_small=_model_points(round(points), size) < READABLE,
    )


def _box(writing: Writing, size: ImageSize) -> tuple[float, float, float, float]:
    """Top, left, height and width in shares of the picture."""
    marks = characters(writing, size)
    top, left = min(mark.top for mark in marks), min(mark.left for mark in marks)
    bottom, right = max(mark.bottom for mark in marks), max(mark.right for mark in marks)
    return top, left, bottom - top, right - left


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return all(
        one[axis] < other[axis] + other[axis + 2] + _GAP
        and other[axis] < one[axis] + one[axis + 2] + _GAP
        for axis in (0, 1)
    )


def _text(rng: Rng) -> tuple[str, str]:
    """Return what is written, in lower case and as it stands in the picture."""
    if rng.random() < 0.6:
        text = str(int(rng.integers(10 if rng.random() < 0.15 else 100)))
        return text, text
    text = pick(rng, WORDS)
    return text, pick(rng, (text, text, text.upper(), text.capitalize()))


def _picture_size(rng: Rng, *, is_bitmap: bool) -> ImageSize:
    """Half of the pictures have a size that people choose, the others any from 1:1.5 to 3.2:1."""
    if is_bitmap or rng.random() < 0.5:
        width, height = pick(rng, _BITMAP_SIZES if is_bitmap and rng.random() < 0.85 else _SIZES)
        return ImageSize(height=height, width=width)
    aspect = float(np.exp(rng.uniform(-np.log(1.5), np.log(3.2))))
    longest = float(np.exp(rng.uniform(np.log(64), np.log(MAX_SIDE))))
    wide, tall = (longest, longest / aspect) if aspect > 1 else (longest * aspect, longest)
    return ImageSize(height=round(tall), width=round(wide))


def _typeface(rng: Rng) -> int:
    return 0 if rng.random() < _DEFAULT_FONT else int(rng.integers(1, NUM_FONTS))


def _model_points(points: int, size: ImageSize) -> float:
    """Return the size of type in the picture that the model sees."""
    return points * _SIDE / max(size)


def _points(rng: Rng, font: int, drawn: str, size: ImageSize) -> int | None:
    """Size of the type, small sizes as likely as their doubles; None where none fits."""
    if font == BITMAP_FONT:
        tall, wide = type_size(drawn, font, BITMAP_POINTS)
        between = _TINY[1] < _model_points(BITMAP_POINTS, size) < _SMALLEST
        fits = wide <= size.width and tall <= size.height and not between
        return BITMAP_POINTS if fits else None
    tall, wide = type_size(drawn, font, 96)
    largest = 96 * min(_FILLS[0] * size.width / wide, _FILLS[1] * size.height / tall)
    scale = max(size) / _SIDE
    low, high = _SMALLEST, largest / scale
    if rng.random() < _SMALL_SHARE:
        low, high = max(_TINY[0], _SMALLEST_TYPE / scale), min(_TINY[1], high)
    if low >= high:
        return None
    return max(round(float(np.exp(rng.uniform(np.log(low), np.log(high)))) * scale), 1)


def _paper(rng: Rng, textured: Background) -> Background:
    """Mostly one colour: white, black or any other."""
    if rng.random() < _TEXTURED:
        return textured
    kind = rng.random()
    rgb: Rgb = (255, 255, 255) if kind < _WHITE else (0, 0, 0)
    if kind > _WHITE + _BLACK:
        rgb = shade(pick(rng, COLOURS), rng)
    return replace(textured, texture="plain", near=rgb, far=rgb)


def _ink(rng: Rng, background: Background) -> tuple[str, Rgb]:
    """Return a colour that can be read on the paper, black or white twice as often as others."""
    grounds = (background.near, background.far)
    first = pick(rng, ("black", "white", *COLOURS))
    for colour in (first, *(COLOURS[int(i)] for i in rng.permutation(len(COLOURS)))):
        rgb = visible_shade(colour, grounds, rng, strokes=True)
        if rgb is not None:
            return colour, rgb
    raise AssertionError(f"neither black nor white can be read on {grounds}")
