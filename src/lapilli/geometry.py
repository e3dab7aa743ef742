"""Sizes of pictures and grids; knows numbers only, no torch and no pixels.

Height always stands before width. The original passes (width, height) pairs around; the border where they turn is
config/parse.py and compat/.
"""

from typing import NamedTuple


class ImageSize(NamedTuple):
    """Height and width of a picture or of a resolution, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        """Width x height, the way people write picture sizes."""
        return f"{self.width}x{self.height}"


class Grid(NamedTuple):
    """Rows and columns of tiles or patches."""

    rows: int
    columns: int
