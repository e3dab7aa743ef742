"""A scene from a seed; knows how often things occur in pebble's world, not how they look."""

from dataclasses import replace
from typing import Final, Literal, cast

import numpy as np

from lapilli.geometry import ImageSize
from pebble.digits import digit_scans, digit_split
from pebble.palette import COLOURS, Rgb, ground, visible_shade
from pebble.scene import (
    DIAMETERS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Background,
    Digit,
    Finish,
    Object,
    Scene,
    Shape,
    Size,
    Writing,
    unit_length,
)

Kind = Literal["objects", "writing", "digit"]

_KINDS: Final[dict[Kind, float]] = {"objects": 0.72, "writing": 0.14, "digit": 0.14}
_JITTER: Final = 0.17 / 3  # of the picture, around the middle of a cell
_GAP: Final = 0.025  # of the unit, between two objects
_FRAME: Final = 0.015  # of the picture, between an object and the edge
_REPEAT: Final = 0.35  # chance that an object takes its colour (its shape) from an earlier one
_TWINS: Final = 0.15  # chance that a scene may hold two objects of one colour and shape
# Share of the diameter: radius around the centre that an object may cover, and half its height.
_REACH: Final[dict[Shape, float]] = {
    "circle": 0.5, "square": 0.64, "triangle": 0.6, "star": 0.58, "cross": 0.53, "ring": 0.5,
}  # fmt: skip
NUM_FONTS: Final = 8
_CROWD: Final = (6, 9)  # objects of a crowded scene
MIN_SIDE: Final = 64
MAX_SIDE: Final = 800


def sample_scene(
    seed: int, kind: Kind | None = None, *, digit_index: int | None = None, crowds: bool = False
) -> Scene:
    """Return the scene of a seed.

    Args:
        seed: any non-negative integer; the same seed gives the same scene.
        kind: only scenes of this kind; None draws the kind too.
        digit_index: draw this scan (for held-out digits); None takes one from the training split.
        crowds: two thirds of the scenes with objects hold six to nine of them. Pebble is asked
            about no such scene; its tower learns shapes sooner where each picture shows many.
    """
    rng = np.random.default_rng([seed, 7])
    drawn = list(_KINDS)[int(rng.choice(len(_KINDS), p=list(_KINDS.values())))]
    chosen = "digit" if digit_index is not None else kind or drawn
    size = _picture_size(rng, portrait=chosen != "writing")
    background = _background(rng)
    finish = _finish(rng, size)
    scene = Scene(seed=seed, size=size, background=background, finish=finish)
    if chosen == "objects":
        crowded = crowds and seed % 3 > 0
        numbers = _CROWD if crowded else (1, MAX_OBJECTS)
        return replace(scene, objects=_objects(rng, size, background, numbers))
    if chosen == "writing":
        return replace(scene, writing=_writing(rng, background))
    return replace(scene, digit=_digit(rng, background, digit_index))


def _picture_size(rng: np.random.Generator, *, portrait: bool) -> ImageSize:
    """Mostly small and 3:2 to 2:3, a quarter up to 2:1.

    Words get no tall picture (`portrait`): their letters would be too small to read.
    """
    stretch = 2.0 if rng.random() < 0.25 else 1.5
    tallest = -1.0 if portrait else -0.2
    aspect = float(np.exp(rng.uniform(tallest, 1.0) * np.log(stretch)))
    aspect = 1.0 if rng.random() < 0.2 else aspect
    widest = MAX_SIDE if rng.random() < 0.08 else 320
    root = max(aspect, 1 / aspect) ** 0.5
    side = float(np.exp(rng.uniform(np.log(MIN_SIDE * root), np.log(widest / root))))
    height, width = round(side / aspect**0.5), round(side * aspect**0.5)
    return ImageSize(
        height=min(max(height, MIN_SIDE), MAX_SIDE), width=min(max(width, MIN_SIDE), MAX_SIDE)
    )


def _background(rng: np.random.Generator) -> Background:
    near, far = ground(rng)
    texture = TEXTURES[int(rng.choice(len(TEXTURES), p=[0.36, 0.22, 0.16, 0.12, 0.14]))]
    return Background(
        texture=texture,
        near=near,
        far=far if texture == "gradient" else near,
        angle=float(rng.uniform(0, 360)),
        strength=float(rng.uniform(2.0, 7.0)),
    )


def _finish(rng: np.random.Generator, size: ImageSize) -> Finish:
    worst = 75 if min(size) < 128 else 45
    quality = int(rng.integers(worst, 98)) if rng.random() < 0.5 else None
    blur = float(rng.uniform(0.002, 0.006)) if rng.random() < 0.08 else 0.0
    return Finish(jpeg_quality=quality, blur=blur)


def _inks(
    rng: np.random.Generator, background: Background, *, strokes: bool = False
) -> dict[str, Rgb]:
    """Every colour that shows on this background, with a shade of it."""
    grounds = (background.near, background.far)
    shades = {colour: visible_shade(colour, grounds, rng, strokes=strokes) for colour in COLOURS}
    return {colour: rgb for colour, rgb in shades.items() if rgb is not None}


def _objects(
    rng: np.random.Generator, size: ImageSize, background: Background, numbers: tuple[int, int]
) -> tuple[Object, ...]:
    inks = _inks(rng, background)
    count = int(rng.integers(numbers[0], numbers[1] + 1))
    looks = _looks(rng, count, list(inks))
    placed = None
    while placed is None:
        sizes = [SIZES[int(rng.integers(2))] for _ in range(min(count, MAX_OBJECTS))]
        sizes += [SIZES[0]] * (count - len(sizes))
        placed = _layout(rng, size, [shape for shape, _ in looks], sizes)
    grounds = (background.near, background.far)
    objects = [
        Object(
            shape=shape,
            colour=colour,
            size=kind,
            cell=cell,
            centre=centre,
            diameter=diameter,
            rgb=visible_shade(colour, grounds, rng) or inks[colour],
            angle=float(rng.uniform(-12, 12)),
        )
        for (shape, colour), kind, (cell, centre, diameter) in zip(
            looks, sizes, placed, strict=True
        )
    ]
    return tuple(sorted(objects, key=lambda item: item.cell))


def _looks(rng: np.random.Generator, count: int, colours: list[str]) -> list[tuple[Shape, str]]:
    """Shape and colour of each object, with repeats, so that there is something to count."""
    twins = rng.random() < _TWINS
    looks: list[tuple[Shape, str]] = []
    while len(looks) < count:
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        colour = colours[int(rng.integers(len(colours)))]
        if looks and rng.random() < _REPEAT:
            shape = looks[int(rng.integers(len(looks)))][0]
        if looks and rng.random() < _REPEAT:
            colour = looks[int(rng.integers(len(looks)))][1]
        if twins or (shape, colour) not in looks:
            looks.append((shape, colour))
    return looks


Spot = tuple[int, tuple[float, float], float]


def _layout(
    rng: np.random.Generator, size: ImageSize, shapes: list[Shape], sizes: list[Size]
) -> list[Spot] | None:
    """Cell, centre and diameter of each object, none touching another; None if that failed."""
    cells = rng.permutation(9)
    unit = unit_length(size)
    spots: list[Spot] = []
    reach: list[float] = []
    for i, (shape, kind) in enumerate(zip(shapes, sizes, strict=True)):
        diameter = float(rng.uniform(*DIAMETERS[kind]))
        radius = _REACH[shape] * diameter
        for _ in range(12):
            centre = _jittered(
                rng, int(cells[i]), (radius * unit / size.height, radius * unit / size.width)
            )
            if all(
                _distance(centre, other, size) > unit * (radius + far + _GAP)
                for (_, other, _), far in zip(spots, reach, strict=True)
            ):
                break
        else:
            return None
        spots.append((int(cells[i]), centre, diameter))
        reach.append(radius)
    return spots


def _jittered(
    rng: np.random.Generator, cell: int, margin: tuple[float, float]
) -> tuple[float, float]:
    """Return a point near the middle of the cell that keeps the object inside the picture."""
    y = (cell // 3 + 0.5) / 3 + float(rng.uniform(-_JITTER, _JITTER))
    x = (cell % 3 + 0.5) / 3 + float(rng.uniform(-_JITTER, _JITTER))
    low_y, low_x = margin[0] + _FRAME, margin[1] + _FRAME
    return min(max(y, low_y), 1 - low_y), min(max(x, low_x), 1 - low_x)


def _distance(one: tuple[float, float], other: tuple[float, float], size: ImageSize) -> float:
    return float(np.hypot((one[0] - other[0]) * size.height, (one[1] - other[1]) * size.width))


def _ink(rng: np.random.Generator, background: Background) -> tuple[str, Rgb]:
    inks = list(_inks(rng, background, strokes=True).items())
    return inks[int(rng.integers(len(inks)))]


def _writing(rng: np.random.Generator, background: Background) -> Writing:
    colour, rgb = _ink(rng, background)
    if rng.random() < 0.5:
        text = drawn = str(int(rng.integers(100)))
    else:
        text = WORDS[int(rng.integers(len(WORDS)))]
        drawn = (text, text.upper(), text.capitalize())[int(rng.integers(3))]
    return Writing(
        text=text,
        drawn=drawn,
        colour=colour,
        rgb=rgb,
        font=int(rng.integers(NUM_FONTS)),
        extent=float(rng.uniform(0.65, 0.95)),
        centre=(float(rng.uniform(0.15, 0.85)), float(rng.uniform(0.15, 0.85))),
        angle=float(rng.uniform(-6, 6)),
    )


def _digit(rng: np.random.Generator, background: Background, index: int | None) -> Digit:
    colour, rgb = _ink(rng, background)
    if index is None:
        allowed = digit_split()[0]
        index = allowed[int(rng.integers(len(allowed)))]
    return Digit(
        value=digit_scans()[1][index],
        index=index,
        colour=colour,
        rgb=rgb,
        extent=float(rng.uniform(0.55, 0.92)),
        centre=(float(rng.uniform(0.15, 0.85)), float(rng.uniform(0.15, 0.85))),
        angle=float(rng.uniform(-10, 10)),
        stretch=cast(tuple[float, float], tuple(float(v) for v in rng.uniform(0.85, 1.12, size=2))),
        sharpness=float(rng.uniform(0.0, 1.0)),
    )
