"""Anyres: the whole picture squashed to a tile, then the tiles of its best resolution (LLaVA 1.6).

flat            every tile after the other
spatial         the base tile, then the joint map of the other tiles row by row
spatial_unpad   the same without the padding, `newline` at the end of every row
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from PIL import Image

from lapilli.config.model import ImageConfig, Merge
from lapilli.config.projector import TileFeatures
from lapilli.errors import ConfigError, FusionError
from lapilli.geometry import Grid, ImageSize
from lapilli.modality.image.modes.base import ImageMode
from lapilli.modality.image.pixels import base_size, fit_and_pad, resize, size_of
from lapilli.shapes import Float, Tensor

# Columns and rows of tiles of the resolutions that the published 1.6 checkpoints choose from.
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


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


class Anyres(ImageMode):
    """A base tile and a grid of tiles."""

    name = "anyres"
    is_tiled = True
    merge: ClassVar[Merge] = "spatial_unpad"
    hf_types: ClassVar[Mapping[Merge, str]] = {"spatial_unpad": "llava_next"}

    def check(self, config: ImageConfig) -> None:
        """Check that there are resolutions to choose from."""
        if not config.pinpoints:
            raise ConfigError(
                f"image_aspect_ratio is {config.aspect!r} but image_grid_pinpoints is empty: "
                "list the resolutions"
            )

    def grid(self, size: ImageSize, config: ImageConfig, side: int) -> Grid:
        """Return rows and columns of the tiles of one picture, without the base tile.

        Raises:
            ConfigError: the best resolution is not a whole number of tiles.

        Source: LLaVA mm_utils.py, get_anyres_image_grid_shape.
        """
        resolution = best_resolution(size, config.pinpoints)
        grid = tile_grid(resolution, side)
        if resolution != (grid.rows * side, grid.columns * side):
            raise ConfigError(
                f"image_grid_pinpoints has {resolution}, which is not a whole number of "
                f"{side}x{side} tiles: every resolution must be a multiple of the vision tower's "
                "image_size"
            )
        return grid

    def cut(self, image: Image.Image, config: ImageConfig) -> list[Image.Image]:
        """Return the squashed picture, then the tiles row by row.

        Source: LLaVA mm_utils.py, process_anyres_image.
        """
        resample = Image.Resampling(config.pixels.resample)
        canvas = fit_and_pad(image, best_resolution(size_of(image), config.pinpoints), resample)
        side = config.pixels.crop_size.height
        corners = [
            (left, top)
            for top in range(0, canvas.height, side)
            for left in range(0, canvas.width, side)
        ]
        tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
        return [resize(image, base_size(config.pixels), resample), *tiles]

    def num_tiles(self, size: ImageSize, config: ImageConfig, side: int) -> int:
        """Return the base tile and the grid."""
        grid = self.grid(size, config, side)
        return 1 + grid.rows * grid.columns

    def num_tokens(
        self, size: ImageSize, config: ImageConfig, tile: TileFeatures, *, has_newline: bool
    ) -> int:
        """Return the features of the base tile and what is kept of the joint map.

        Source: transformers processing_llava_next.py, _get_number_of_features.
        """
        if config.merge == "flat":
            return super().num_tokens(size, config, tile, has_newline=has_newline)
        patches = _places(config, tile)
        grid = self.grid(size, config, tile.side)
        kept = Grid(grid.rows * patches.rows, grid.columns * patches.columns)
        if config.merge == "spatial_unpad":
            kept = unpadded(size, kept, rounds=config.rounds_unpad)
        ends_in_newline = has_newline and config.merge == "spatial_unpad"
        return tile.number + kept.rows * (kept.columns + int(ends_in_newline))

    def join(
        self,
        features: Float[Tensor, "N P D"],
        size: ImageSize,
        config: ImageConfig,
        tile: TileFeatures,
        *,
        newline: Float[Tensor, " D"] | None,
    ) -> Float[Tensor, "n D"]:
        """Return the base tile, then the map of the others."""
        if config.merge == "flat" or len(features) == 1:
            return super().join(features, size, config, tile, newline=newline)
        joint = self._map(features[1:], size, config, tile)
        if config.merge == "spatial_unpad":
            height, width = joint.shape[:2]
            margins = unpad_margins(size, Grid(height, width), rounds=config.rounds_unpad)
            joint = joint[
                margins.rows : height - margins.rows, margins.columns : width - margins.columns
            ]
            if newline is not None:
                joint = torch.cat([joint, newline.expand(len(joint), 1, -1)], dim=1)
        return torch.cat([features[0], joint.flatten(0, 1)])

    def _map(
        self,
        tiles: Float[Tensor, "N P D"],
        size: ImageSize,
        config: ImageConfig,
        tile: TileFeatures,
    ) -> Float[Tensor, "H W D"]:
        """Return the features of a grid of tiles as one map."""
        patches = _places(config, tile)
        grid = self.grid(size, config, tile.side)
        expected = (grid.rows * grid.columns, tile.number)
        if tuple(tiles.shape[:2]) != expected:
            raise FusionError(
                f"a picture of {size} needs {expected[0]} tiles of {expected[1]} features after "
                f"the base tile, got {tiles.shape[0]} tiles of {tiles.shape[1]}"
            )
        split = tiles.reshape(*grid, *patches, -1)  # [rows, columns, h, w, D]
        return split.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def llava_keys(self, side: int) -> dict[str, object]:
        """Return the keys with the resolutions, width first."""
        pinpoints = [[columns * side, rows * side] for columns, rows in _GRIDS]
        return {**super().llava_keys(side), "image_grid_pinpoints": pinpoints}

    def hf_keys(self, config: ImageConfig) -> dict[str, object]:
        """Return the resolutions, height first."""
        pinpoints = [list(size) for size in config.pinpoints]
        return {"image_grid_pinpoints": pinpoints, "use_image_newline_parameter": True}

    def hf_preprocessor(self, config: ImageConfig) -> dict[str, object]:
        """Return the processor that tiles, with the resolutions, height first."""
        return {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": [list(size) for size in config.pinpoints],
            "do_pad": True,
        }


def _places(config: ImageConfig, tile: TileFeatures) -> Grid:
    """Return rows and columns of the features of one tile, which a map of tiles needs.

    Raises:
        ConfigError: features without a place: a kept class token, a resampler's.
    """
    if tile.grid is None:
        raise ConfigError(
            f"mm_patch_merge_type {config.merge!r} lays features out as a map, but {tile.reason}: "
            "use features of patches ('patch', no resampler), or merge 'flat'"
        )
    return tile.grid


MODE = Anyres()
