"""Pixel arithmetic: Pillow images resized and padded, and tiles as the numbers of a vision tower.

Source: LLaVA mm_utils.py, process_images; transformers CLIPImageProcessor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lapilli.config.model import PixelConfig, VisionConfig
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize, fit_within, with_shortest_edge
from lapilli.modality.image.decode import as_rgb, check_bytes
from lapilli.shapes import Float, Tensor

# Above this many pixels an intermediate picture (a padded square, a resized strip) is not built:
# a picture of 60000x1 would ask for 13 GiB. `pad` differs from the original where a side is longer
# than 11585 pixels, `square` where the sides are more than about 1000 : 1.
MAX_INTERMEDIATE_PIXELS = 1 << 27


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """The tiles of one picture and the size that the picture had before."""

    pixel_values: Float[Tensor, "N C H W"]
    size: ImageSize


def size_of(image: Image.Image) -> ImageSize:
    """Return height and width of a Pillow image."""
    return ImageSize(image.height, image.width)


def pad_to_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Return the picture in the middle of a square; a square picture comes back as it is.

    Raises:
        MediaError: the square would take too much memory.
        TypeError: the image's mode cannot hold a background of that many channels (Pillow).

    Source: LLaVA mm_utils.py, expand2square.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    check_bytes(4 * side * side, f"the picture ({size_of(image)})", f"a square of {side}x{side}")
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def fit_and_pad(image: Image.Image, target: ImageSize, resample: Image.Resampling) -> Image.Image:
    """Return the picture as large as it fits into `target`, in the middle of black.

    Source: LLaVA mm_utils.py, resize_and_pad_image.
    """
    inner = fit_within(size_of(image), target)
    canvas = Image.new("RGB", (target.width, target.height), (0, 0, 0))
    resized = image.resize((inner.width, inner.height), resample)
    canvas.paste(resized, ((target.width - inner.width) // 2, (target.height - inner.height) // 2))
    return canvas


def resize(image: Image.Image, size: ImageSize, resample: Image.Resampling) -> Image.Image:
    """Return the whole picture in another size.

    Pillow brings every row to the new width before it brings the columns to the new height: a
    picture 1 pixel wide and 10 million high becomes one of 336 x 10 million in between.

    Raises:
        MediaError: that would take too much memory.
    """
    between = 4 * size.width * max(image.height, size.height)
    check_bytes(
        4 * image.width * image.height + between,
        f"the picture ({size_of(image)})",
        f"resizing it to {size}",
    )
    return image.resize((size.width, size.height), resample)


def base_size(pixels: PixelConfig) -> ImageSize:
    """Return the size to which a whole picture is squashed, whatever its shape."""
    if pixels.resize_to is not None:
        return pixels.resize_to
    if pixels.shortest_edge is not None:
        return ImageSize(pixels.shortest_edge, pixels.shortest_edge)
    return pixels.crop_size


def tile_values(
    parts: Sequence[Image.Image], pixels: PixelConfig, vision: VisionConfig | None = None
) -> Float[Tensor, "N C H W"]:
    """Return pictures as normalised tiles, float32.

    Args:
        parts: one picture per tile. Other modes than RGB are resized as they are and converted
            afterwards, in the original's order.
        pixels: sizes, mean and so on.
        vision: when given, its image_size is compared with what comes out.

    Raises:
        ConfigError: the tiles are not what the tower reads.
        MediaError: resizing a picture would take too much memory.
    """
    table = _normalisation_table(pixels)
    tiles = [_normalise(_to_tile(part, pixels), table) for part in parts]
    shapes = {tile.shape for tile in tiles}
    side = vision.image_size if vision is not None else tiles[0].shape[1]
    if len(shapes) > 1 or (vision is not None and shapes != {(3, side, side)}):
        raise ConfigError(
            f"preprocessor_config.json makes tiles of {sorted(shapes)}, but the vision tower reads "
            f"{side}x{side}: crop_size must be the tower's image_size"
        )
    return torch.from_numpy(np.stack(tiles))


def _to_tile(image: Image.Image, pixels: PixelConfig) -> NDArray[np.uint8]:
    """Return one picture as 8-bit numbers [H, W, 3] of the tower's size."""
    image = as_rgb(image)
    resample = Image.Resampling(pixels.resample)
    crop = pixels.crop_size if pixels.do_center_crop else None
    if pixels.do_resize:
        size = _resized_size(size_of(image), pixels)
        if crop is not None and size.height * size.width > MAX_INTERMEDIATE_PIXELS:
            return np.asarray(_resize_middle(image, size, crop, resample))
        image = resize(image, size, resample)
    values = np.asarray(image)
    return values if crop is None else _centre_crop(values, crop)


def _resized_size(size: ImageSize, pixels: PixelConfig) -> ImageSize:
    if pixels.resize_to is not None:
        return pixels.resize_to
    if pixels.shortest_edge is not None:
        return with_shortest_edge(size, pixels.shortest_edge)
    raise ConfigError(
        "preprocessor_config.json has do_resize but no size: give shortest_edge or height and width"
    )


def _resize_middle(
    image: Image.Image, size: ImageSize, crop: ImageSize, resample: Image.Resampling
) -> Image.Image:
    """Return the middle of a resized picture without building the rest.

    Only for pictures whose resized form would not fit into memory: Pillow rounds the box to float32
    and may swap its two passes, so that single levels differ from resizing and cropping.
    """
    scale = size.width / image.width, size.height / image.height
    left, top = (size.width - crop.width) // 2, (size.height - crop.height) // 2
    box = (
        max(0.0, left / scale[0]),
        max(0.0, top / scale[1]),
        min(float(image.width), (left + crop.width) / scale[0]),
        min(float(image.height), (top + crop.height) / scale[1]),
    )
    return image.resize((crop.width, crop.height), resample, box=box)


def _centre_crop(values: NDArray[np.uint8], crop: ImageSize) -> NDArray[np.uint8]:
    """Return the middle of an image, with zeros around one that is smaller than the crop.

    Source: transformers image_transforms.py, center_crop: an odd rest goes below and right when
        cutting, above and left when padding.
    """
    height, width = values.shape[:2]
    top, left = (height - crop.height) // 2, (width - crop.width) // 2
    if top >= 0 and left >= 0:
        return values[top : top + crop.height, left : left + crop.width]
    canvas = np.zeros((max(crop.height, height), max(crop.width, width), 3), np.uint8)
    pad_top, pad_left = (
        math.ceil((canvas.shape[0] - height) / 2),
        math.ceil((canvas.shape[1] - width) / 2),
    )
    canvas[pad_top : pad_top + height, pad_left : pad_left + width] = values
    top, left = max(0, top + pad_top), max(0, left + pad_left)
    return canvas[top : top + crop.height, left : left + crop.width]


def _normalisation_table(pixels: PixelConfig) -> NDArray[np.float32]:
    """Return what each of the 256 levels becomes in each channel, [3, 256].

    A pixel has only 256 values, so the arithmetic is done once: rescaled in float64, rounded to
    float32, normalised in float32, which is the order of transformers.
    """
    levels = np.arange(256, dtype=np.float64)
    if pixels.do_rescale:
        levels = levels * pixels.rescale_factor
    table = np.repeat(levels.astype(np.float32)[None], 3, axis=0)
    if pixels.do_normalize:
        mean = np.array(pixels.mean, np.float32)[:, None]
        table = (table - mean) / np.array(pixels.std, np.float32)[:, None]
    return table


def _normalise(values: NDArray[np.uint8], table: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.empty((3, *values.shape[:2]), np.float32)
    for channel in range(3):  # mode="clip" lets take write into `out` without a buffer
        np.take(table[channel], values[:, :, channel], out=out[channel], mode="clip")
    return out
