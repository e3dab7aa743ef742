"""Geometry: sizes of pictures and grids; knows numbers only, no torch and no pixels.

Height always stands before width. The original passes (width, height) pairs around; the border
where they turn is config/parse.py and compat/.
"""

import math
from collections.abc import Sequence
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


def best_resolution(size: ImageSize, candidates: Sequence[ImageSize]) -> ImageSize:
    """Return the candidate that shows most of a picture, then the one that wastes least.

    The picture's two scaled sides are truncated to whole pixels, a picture is never counted larger
    than it is, and the first of equal candidates wins.

    Raises:
        ValueError: there are no candidates.

    Source: LLaVA mm_utils.py, select_best_resolution; LLaVA-NeXT blog, "dynamic high resolution".
    """

    def merit(candidate: ImageSize) -> tuple[int, int]:
        scale = min(candidate.width / size.width, candidate.height / size.height)
        shown = int(size.width * scale) * int(size.height * scale)
        effective = min(shown, size.width * size.height)
        wasted = candidate.width * candidate.height - effective
        return effective, -wasted

    return max(candidates, key=merit)  # max keeps the first of equals


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


def tile_grid(resolution: ImageSize, tile: int) -> Grid:
    """Return rows and columns of whole square tiles in a resolution."""
    return Grid(resolution.height // tile, resolution.width // tile)


def unpad_margins(size: ImageSize, feature_map: Grid, *, rounds: bool = False) -> Grid:
    """Return rows on top and columns on the left of a feature map that show only padding.

    Args:
        size: the picture before it was resized.
        feature_map: rows and columns of the features of all tiles together.
        rounds: round to 7 decimals before truncating, as Hugging Face does; the original truncates
            at once, so that 23.999999999999996 becomes 23.

    Returns:
        What is cut off on either side (as much below and on the right); one of the two numbers is
        0. When the remainder is odd, the additional row or column stays.

    Source: LLaVA llava_arch.py, unpad_image; transformers modeling_llava_next.py, unpad_image.
    """

    def whole(value: float) -> int:
        return int(round(value, 7)) if rounds else int(value)

    if size.width / size.height > feature_map.columns / feature_map.rows:
        kept = whole(size.height * (feature_map.columns / size.width))
        return Grid((feature_map.rows - kept) // 2, 0)
    kept = whole(size.width * (feature_map.rows / size.height))
    return Grid(0, (feature_map.columns - kept) // 2)


def unpadded(size: ImageSize, feature_map: Grid, *, rounds: bool = False) -> Grid:
    """Return the size of a feature map without its margins; an extreme picture leaves nothing.

    A picture of 2000x20 leaves 0 rows: its map is dropped and only the base tile speaks for it.
    """
    margins = unpad_margins(size, feature_map, rounds=rounds)
    return Grid(feature_map.rows - 2 * margins.rows, feature_map.columns - 2 * margins.columns)
