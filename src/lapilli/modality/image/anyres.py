"""How many tiles and how many features a picture becomes; knows sizes only, no pixels."""

from lapilli.config.model import ImageConfig, ProjectorConfig, VisionConfig
from lapilli.config.projector import TileFeatures, tile_features
from lapilli.errors import ConfigError
from lapilli.geometry import Grid, ImageSize, best_resolution, tile_grid, unpadded


def picture_grid(size: ImageSize, config: ImageConfig, tile: int) -> Grid:
    """Rows and columns of the tiles of one picture, without the base tile.

    Args:
        size: the picture as it was opened.
        config: its `pinpoints` are the resolutions to choose from.
        tile: side of a tile in pixels (the tower's image_size).

    Raises:
        ConfigError: the best resolution is not a whole number of tiles.

    Source: LLaVA mm_utils.py, get_anyres_image_grid_shape.
    """
    resolution = best_resolution(size, config.pinpoints)
    grid = tile_grid(resolution, tile)
    if resolution != (grid.rows * tile, grid.columns * tile):
        raise ConfigError(
            f"image_grid_pinpoints has {resolution}, which is not a whole number of {tile}x{tile} "
            "tiles: every resolution must be a multiple of the vision tower's image_size"
        )
    return grid


def num_tiles(size: ImageSize, config: ImageConfig, tile: int) -> int:
    """Tiles that the tower sees: one, or with anyres the base tile and the grid."""
    if config.aspect != "anyres":
        return 1
    grid = picture_grid(size, config, tile)
    return 1 + grid.rows * grid.columns


def merged_map(size: ImageSize, config: ImageConfig, patches: Grid, grid: Grid) -> Grid:
    """Rows and columns of features that are kept of the tiles' joint map.

    Args:
        size: the picture as it was opened.
        config: `spatial` keeps the whole map, `spatial_unpad` what is not padding.
        patches: features of one tile.
        grid: tiles of the picture.
    """
    whole = Grid(grid.rows * patches.rows, grid.columns * patches.columns)
    if config.merge == "spatial_unpad":
        return unpadded(size, whole, rounds=config.rounds_unpad)
    return whole


def features_grid(config: ImageConfig, tile: TileFeatures) -> Grid:
    """Rows and columns of the features of one tile, which a map of several tiles needs.

    Raises:
        ConfigError: features without a place: a kept class token, a resampler's.
    """
    if tile.grid is None:
        raise ConfigError(
            f"mm_patch_merge_type {config.merge!r} lays features out as a map, but {tile.reason}: "
            "use features of patches ('patch', no resampler), or merge 'flat'"
        )
    return tile.grid


def num_tokens(
    size: ImageSize,
    config: ImageConfig,
    vision: VisionConfig,
    *,
    projector: ProjectorConfig | None = None,
    has_newline: bool = True,
) -> int:
    """Features of one picture, which is also the number of positions kept for it in a prompt.

    Args:
        size: the picture as it was opened.
        config: aspect, merge and resolutions.
        vision: the tower, which decides how many features a tile has.
        projector: decides it too where it joins features; None: it does not.
        has_newline: whether `merge_tiles` will be given a newline vector; it counts with
            `spatial_unpad` only. The original gives none to a picture that is not tiled.

    Raises:
        ConfigError: the configuration cannot lay these features out.

    Source: LLaVA llava_arch.py, prepare_inputs_labels_for_multimodal; transformers
        processing_llava_next.py, _get_number_of_features.
    """
    newlines = has_newline and config.merge == "spatial_unpad"
    tile = tile_features(vision, projector)
    if config.aspect != "anyres":
        return tile.number + int(newlines)
    if config.merge == "flat":
        return num_tiles(size, config, vision.image_size) * tile.number
    grid = picture_grid(size, config, vision.image_size)
    kept = merged_map(size, config, features_grid(config, tile), grid)
    return tile.number + kept.rows * (kept.columns + int(newlines))
