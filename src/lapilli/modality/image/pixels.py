"""From a Pillow image to the normalised tiles that a vision tower reads; runs no tower.

    square   shorter side to the tower's size, centre cut out
    pad      a square of mean colour around the picture, then as above
    anyres   the squashed picture, then the tiles of its best resolution, each as above

Source: LLaVA mm_utils.py, process_images; transformers CLIPImageProcessor.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lapilli.config.model import ImageConfig, PixelConfig, VisionConfig
from lapilli.errors import ConfigError, MediaError
from lapilli.geometry import ImageSize, best_resolution, with_shortest_edge
from lapilli.modality.image.decode import as_rgb, check_bytes
from lapilli.modality.image.resize_modes import fit_and_pad, pad_to_square, size_of
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


def prepare(
    image: Image.Image, config: ImageConfig, vision: VisionConfig | None = None
) -> PreparedImage:
    """The normalised tiles of one picture, float32.

    Args:
        image: RGB (see `decode.to_rgb`). Other modes are resized as they are and converted
            afterwards, in the original's order.
        config: aspect, resolutions and pixel arithmetic.
        vision: when given, its image_size is compared with what comes out.

    Raises:
        ConfigError: the tiles are not what the tower reads.
        MediaError: the picture has no pixels, or resizing it would take too much memory.

    Note: a picture 1 or 3 pixels high is a picture here; the original takes it for channel-first
        numbers and fails or scrambles it (compat/ does so too).
    """
    size = size_of(image)
    if not size.height or not size.width:
        raise MediaError(f"the picture is empty: {size} pixels")
    table = _normalisation_table(config.pixels)
    tiles = [_normalise(_to_tile(part, config.pixels), table) for part in _parts(image, config)]
    shapes = {tile.shape for tile in tiles}
    side = vision.image_size if vision is not None else tiles[0].shape[1]
    if len(shapes) > 1 or (vision is not None and shapes != {(3, side, side)}):
        raise ConfigError(
            f"preprocessor_config.json makes tiles of {sorted(shapes)}, but the vision tower reads "
            f"{side}x{side}: crop_size must be the tower's image_size"
        )
    return PreparedImage(torch.from_numpy(np.stack(tiles)), size)


def _parts(image: Image.Image, config: ImageConfig) -> list[Image.Image]:
    """The pictures that become one tile each."""
    if config.aspect == "pad":
        return [_pad(image, config.pixels)]
    if config.aspect == "square":
        return [image]
    pixels = config.pixels
    resample = Image.Resampling(pixels.resample)
    target = best_resolution(size_of(image), config.pinpoints)
    canvas = fit_and_pad(image, target, resample)
    base = _base_size(pixels)
    squashed = _resize(image, base, resample)
    return [squashed, *_cut(canvas, pixels.crop_size.height)]


def _resize(image: Image.Image, size: ImageSize, resample: Image.Resampling) -> Image.Image:
    """The whole picture in another size, unless that would take too much memory.

    Pillow brings every row to the new width before it brings the columns to the new height: a
    picture 1 pixel wide and 10 million high becomes one of 336 x 10 million in between.
    """
    between = 4 * size.width * max(image.height, size.height)
    check_bytes(
        4 * image.width * image.height + between,
        f"the picture ({size_of(image)})",
        f"resizing it to {size}",
    )
    return image.resize((size.width, size.height), resample)


def _base_size(pixels: PixelConfig) -> ImageSize:
    if pixels.resize_to is not None:
        return pixels.resize_to
    if pixels.shortest_edge is not None:
        return ImageSize(pixels.shortest_edge, pixels.shortest_edge)
    return pixels.crop_size


def _cut(canvas: Image.Image, tile: int) -> list[Image.Image]:
    return [
        canvas.crop((left, top, left + tile, top + tile))
        for top in range(0, canvas.height, tile)
        for left in range(0, canvas.width, tile)
    ]


def _pad(image: Image.Image, pixels: PixelConfig) -> Image.Image:
    longer = max(image.size)
    if longer * longer > MAX_INTERMEDIATE_PIXELS:
        scale = math.isqrt(MAX_INTERMEDIATE_PIXELS) / 4 / longer  # exactness is lost: be quick
        smaller = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        image = image.resize(smaller, Image.Resampling(pixels.resample))
    return pad_to_square(image, tuple(int(channel * 255) for channel in pixels.mean))


def _to_tile(image: Image.Image, pixels: PixelConfig) -> NDArray[np.uint8]:
    """One picture as 8-bit numbers [H, W, 3] of the tower's size."""
    image = as_rgb(image)
    resample = Image.Resampling(pixels.resample)
    crop = pixels.crop_size if pixels.do_center_crop else None
    if pixels.do_resize:
        size = _resized_size(size_of(image), pixels)
        if crop is not None and size.height * size.width > MAX_INTERMEDIATE_PIXELS:
            return np.asarray(_resize_middle(image, size, crop, resample))
        image = _resize(image, size, resample)
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
    """The middle of a resized picture without building the rest.

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
    """The middle of an image; zeros around one that is smaller than the crop.

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
    """What each of the 256 levels becomes in each channel, [3, 256].

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
