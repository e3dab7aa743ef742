"""Geometry: sizes of pictures and grids; knows numbers only, no torch and no pixels.

Height always stands before width. The original passes (width, height) pairs around; the border
where they turn is config/huggingface.py and compat/.
"""

import math
from typing import NamedTuple


class ImageSize(NamedTuple):
    """Height and width of a picture or of a resolution, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        """Return width x height, the way people write picture sizes."""
        return f"{self.width}x{self.height}"


class Grid(NamedTuple):
    """Rows and columns of tiles or patches."""

    rows: int
    columns: int


def fit_within(size: ImageSize, target: ImageSize) -> ImageSize:
    """Return the size that a picture takes inside `target` when it keeps its shape.

    One side becomes the target's exactly; the other is rounded up, so that it is never 0.

    Source: LLaVA mm_utils.py, resize_and_pad_image.
    """
    scale_width = target.width / size.width
    scale_height = target.height / size.height
    if scale_width < scale_height:
        return ImageSize(min(math.ceil(size.height * scale_width), target.height), target.width)
    return ImageSize(target.height, min(math.ceil(size.width * scale_height), target.width))


def with_shortest_edge(size: ImageSize, edge: int) -> ImageSize:
    """Return the size with a shorter side of `edge`; the longer one is truncated.

    Source: transformers image_transforms.py, get_resize_output_image_size.
    """
    if size.width <= size.height:
        return ImageSize(int(edge * size.height / size.width), edge)
    return ImageSize(edge, int(edge * size.width / size.height))
