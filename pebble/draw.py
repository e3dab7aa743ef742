"""A picture from a scene; knows Pillow and numpy, no sentences and no sampling of scenes.

    background (numpy)  ->  objects | writing | digit, each a mask pasted in its colour  ->  blur,
    JPEG

Masks are drawn several times larger than they appear and scaled down, which gives smooth edges.
Randomness that a scene does not hold (the grain of a texture) comes from the scene's seed, so a
scene always gives the same picture.
"""

import io
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from lapilli.geometry import ImageSize
from pebble.glyphs import digit_mask, writing_mask
from pebble.scene import Background, Object, Scene, Shape

PAD_RGB: Final = (122, 116, 104)  # CLIP's mean colour, as the original pads


def draw(scene: Scene) -> Image.Image:
    """Return the scene as an RGB picture of `scene.size`."""
    rng = np.random.default_rng([scene.seed, 11])
    picture = Image.fromarray(_background(scene.background, scene.size, rng))
    for item in scene.objects:
        mask = _object_mask(item, scene.unit)
        _paste(picture, mask, item.rgb, item.centre)
    for writing in scene.writings:
        mask, centre = writing_mask(writing, scene.size)
        _paste(picture, mask, writing.rgb, centre)
    if scene.digit is not None:
        mask, centre = digit_mask(scene.digit, scene.size)
        _paste(picture, mask, scene.digit.rgb, centre)
    if scene.finish.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(scene.finish.blur * min(scene.size)))
    if scene.finish.jpeg_quality is not None:
        picture = _through_jpeg(picture, scene.finish.jpeg_quality)
    return picture


def model_pixels(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """uint8 [3, side, side]: padded to a square with the mean colour, then bicubic.

    Note: The pixels that `modality.image.pixels` makes for `image_aspect_ratio: pad`, before they
    are scaled and normalised; a test compares the two.
    """
    longest = max(picture.size)
    if picture.width != picture.height:
        square = Image.new("RGB", (longest, longest), PAD_RGB)
        corner = ((longest - picture.width) // 2, (longest - picture.height) // 2)
        square.paste(picture, corner)
        picture = square
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _background(ground: Background, size: ImageSize, rng: np.random.Generator) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]."""
    near = np.array(ground.near, dtype=np.float32)
    if ground.texture == "plain":
        return np.asarray(np.broadcast_to(near, (*size, 3)), dtype=np.uint8)
    angle = math.radians(ground.angle)
    y = np.linspace(-1, 1, size.height, dtype=np.float32)[:, None] * math.sin(angle)
    x = np.linspace(-1, 1, size.width, dtype=np.float32)[None, :] * math.cos(angle)
    along = (y + x).astype(np.float32)  # -1.42 to 1.42 across the picture
    if ground.texture == "gradient":
        far = np.array(ground.far, dtype=np.float32)
        share = np.clip(along / 2.83 + 0.5, 0, 1)[:, :, None]
        return np.asarray(near + (far - near) * share, dtype=np.uint8)
    grain = _grain(ground, size, along, rng) * ground.strength
    return np.asarray(np.clip(near + grain[:, :, None], 0, 255), dtype=np.uint8)


def _grain(
    ground: Background, size: ImageSize, along: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """float32 [H, W], about -1 to 1."""
    if ground.texture == "stripes":
        waves = 6.0 + 14.0 * float(rng.random())
        return np.asarray(np.sign(np.sin(along * waves)), dtype=np.float32)
    if ground.texture == "noise":
        return np.asarray(rng.standard_normal(tuple(size), dtype=np.float32))
    coarse = rng.standard_normal((size.height // 6 + 2, size.width // 6 + 2), dtype=np.float32)
    sheet = Image.fromarray(coarse).resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.asarray(sheet)


def _paste(
    picture: Image.Image, mask: Image.Image, rgb: tuple[int, int, int], centre: tuple[float, float]
) -> None:
    left = round(centre[1] * picture.width - mask.width / 2)
    top = round(centre[0] * picture.height - mask.height / 2)
    picture.paste(rgb, (left, top), mask)


def _object_mask(item: Object, unit: float) -> Image.Image:
    """Return the object's shape in a square box, 0 to 255."""
    diameter = item.diameter * unit
    factor = 6 if diameter < 40 else 3 if diameter < 120 else 2
    side = math.ceil(diameter * 1.4)
    mask = Image.new("L", (side * factor, side * factor), 0)
    brush = ImageDraw.Draw(mask)
    middle = side * factor / 2
    radius = diameter * factor / 2
    if item.shape in ("circle", "ring"):
        _disc(brush, middle, radius, 255)
        if item.shape == "ring":
            _disc(brush, middle, radius * 0.55, 0)
    else:
        brush.polygon(_corners(item.shape, middle, radius, math.radians(item.angle)), fill=255)
    return mask.reduce(factor)


def _disc(brush: ImageDraw.ImageDraw, middle: float, radius: float, fill: int) -> None:
    brush.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=fill)


# Polar outline of each shape: (share of the radius, degrees from the top).
_OUTLINES: Final[dict[Shape, tuple[tuple[float, float], ...]]] = {
    "square": tuple((1.25, 45.0 + 90 * i) for i in range(4)),
    "triangle": tuple((1.18, 120.0 * i) for i in range(3)),
    "star": tuple(((1.15, 0.46)[i % 2], 36.0 * i) for i in range(10)),
    "cross": tuple(
        (radius, 90.0 * i + degrees)
        for i in range(4)
        for radius, degrees in ((1.044, -16.7), (1.044, 16.7), (0.424, 45.0))
    ),
}


def _corners(shape: Shape, middle: float, radius: float, angle: float) -> list[tuple[float, float]]:
    points = []
    for share, degrees in _OUTLINES[shape]:
        turn = math.radians(degrees) + angle
        points.append(
            (middle + share * radius * math.sin(turn), middle - share * radius * math.cos(turn))
        )
    return points


def _through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
