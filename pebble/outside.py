"""Pictures from outside pebble's world, drawn from a seed; knows no scene and no model.

A detector that tells a user "this is not my world" needs examples of both sides for its threshold.
None of these can be described with pebble's words, and no photograph has to be shipped for them.
"""

from collections.abc import Callable
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lapilli.geometry import ImageSize

OutsideKind = Literal["texture", "noise", "landscape", "crowd", "page", "mosaic", "scribble"]
Rng = np.random.Generator


def outside_picture(seed: int, kind: OutsideKind | None = None) -> Image.Image:
    """Return an RGB picture of 96 to 640 pixels; the same seed and kind give the same picture.

    Args:
        seed: any non-negative integer.
        kind: one of `OUTSIDE_KINDS`; None draws one.
    """
    rng = np.random.default_rng([seed, 23])
    chosen = OUTSIDE_KINDS[int(rng.integers(len(OUTSIDE_KINDS)))]
    height, width = (int(side) for side in rng.integers(96, 641, size=2))
    size = ImageSize(height=min(height, 2 * width), width=min(width, 2 * height))
    return _PAINTERS[kind or chosen](size, rng)


def _cloud(size: ImageSize, rng: Rng, octaves: tuple[int, ...]) -> NDArray[np.float32]:
    """Smooth randomness, float32 [H, W, 3] in 0 to 1; fine octaves are fainter."""
    total = np.zeros((*size, 3), dtype=np.float32)
    for cells in octaves:
        for channel in range(3):
            grid = rng.random((cells + 1, cells + 1), dtype=np.float32)
            sheet = Image.fromarray(grid).resize(
                (size.width, size.height), Image.Resampling.BICUBIC
            )
            total[:, :, channel] += np.asarray(sheet) * (octaves[0] / cells)
    low, high = total.min(), total.max()
    return np.asarray((total - low) / max(float(high - low), 1e-6), dtype=np.float32)


def _as_picture(values: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.asarray(np.clip(values, 0, 1) * 255, dtype=np.uint8))


def _texture(size: ImageSize, rng: Rng) -> Image.Image:
    """Marble-like: several octaves of smooth randomness in colour."""
    return _as_picture(_cloud(size, rng, (2, 5, 11, 23, 47)))


def _noise(size: ImageSize, rng: Rng) -> Image.Image:
    """Independent pixels, coarse or fine."""
    cell = int(rng.integers(1, 9))
    small = rng.random((size.height // cell + 1, size.width // cell + 1, 3), dtype=np.float32)
    return _as_picture(small).resize((size.width, size.height), Image.Resampling.NEAREST)


def _landscape(size: ImageSize, rng: Rng) -> Image.Image:
    """Sky over ragged ridges with a grain: the layout of an outdoor photograph."""
    values = np.linspace(0.9, 0.6, size.height, dtype=np.float32)[:, None, None] * (
        0.4 + 0.6 * rng.random(3, dtype=np.float32)
    )
    values = np.ascontiguousarray(np.broadcast_to(values, (*size, 3)))
    grain = _cloud(size, rng, (4, 17, 61))
    rows = np.arange(size.height)[:, None]
    for level in (0.4, 0.6, 0.8):
        walk = np.cumsum(rng.standard_normal(size.width)) * size.height * 0.006
        ground = rows > size.height * level + walk[None, :] - walk.mean()
        tone = rng.random(3, dtype=np.float32) * 0.5
        values = np.where(ground[:, :, None], tone + 0.4 * grain, values)
    return _as_picture(np.asarray(values, dtype=np.float32)).filter(ImageFilter.GaussianBlur(1))


def _crowd(size: ImageSize, rng: Rng) -> Image.Image:
    """Twenty to eighty overlapping ellipses and boxes of any colour."""
    picture = _as_picture(_cloud(size, rng, (2, 3)))
    brush = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(20, 81))):
        fill = tuple(int(value) for value in rng.integers(0, 256, size=3))
        y, x = rng.uniform(0, size.height), rng.uniform(0, size.width)
        tall, wide = rng.uniform(0.03, 0.25, size=2) * min(size)
        box = (x - wide, y - tall, x + wide, y + tall)
        if rng.random() < 0.5:
            brush.ellipse(box, fill=fill)
        else:
            brush.rectangle(box, fill=fill)
    return picture


def _page(size: ImageSize, rng: Rng) -> Image.Image:
    """Return a screenful of small text in lines, with a bar on top: a document or a screenshot."""
    picture = Image.new("RGB", (size.width, size.height), (250, 250, 248))
    brush = ImageDraw.Draw(picture)
    tone = tuple(int(value) for value in rng.integers(30, 200, size=3))
    brush.rectangle((0, 0, size.width, size.height // 12), fill=tone)
    points = int(rng.integers(9, 16))
    font = ImageFont.load_default(points)
    letters = np.array(list("etaoinshrdlucmfwypvbgk     "))
    for top in range(size.height // 12 + points, size.height, points + 4):
        line = "".join(rng.choice(letters, size=int(rng.integers(10, 2 * size.width // points))))
        brush.text((points, top), line, fill=(40, 40, 46), font=font)
    return picture


def _mosaic(size: ImageSize, rng: Rng) -> Image.Image:
    """Many straight-edged regions of any colour, as in charts and games."""
    picture = Image.new("RGB", (size.width, size.height))
    brush = ImageDraw.Draw(picture)
    rows, columns = (int(number) for number in rng.integers(5, 12, size=2))
    for row in range(rows):
        for column in range(columns):
            fill = tuple(int(value) for value in rng.integers(0, 256, size=3))
            left, top = column * size.width / columns, row * size.height / rows
            box = (left, top, left + size.width / columns, top + size.height / rows)
            brush.rectangle(box, fill=fill)
    return picture


def _scribble(size: ImageSize, rng: Rng) -> Image.Image:
    """Long crossing curves."""
    picture = Image.new("RGB", (size.width, size.height), (245, 244, 240))
    brush = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(6, 20))):
        walk = np.cumsum(rng.standard_normal((60, 2)), axis=0) * 0.06 + rng.random(2)
        points = [(float(x) * size.width, float(y) * size.height) for y, x in walk]
        fill = tuple(int(value) for value in rng.integers(0, 200, size=3))
        brush.line(points, fill=fill, width=int(rng.integers(1, 6)), joint="curve")
    return picture


_PAINTERS: Final[dict[OutsideKind, Callable[[ImageSize, Rng], Image.Image]]] = {
    "texture": _texture,
    "noise": _noise,
    "landscape": _landscape,
    "crowd": _crowd,
    "page": _page,
    "mosaic": _mosaic,
    "scribble": _scribble,
}
OUTSIDE_KINDS: Final[tuple[OutsideKind, ...]] = tuple(_PAINTERS)
