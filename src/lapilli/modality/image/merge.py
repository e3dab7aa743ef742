"""From the features of tiles to the row of features that stands for a picture; runs no tower."""

import torch

from lapilli.config.model import ImageConfig, ProjectorConfig, VisionConfig
from lapilli.config.projector import tile_features
from lapilli.errors import FusionError
from lapilli.geometry import Grid, ImageSize, unpad_margins
from lapilli.modality.image.anyres import features_grid, picture_grid
from lapilli.shapes import Float, Tensor


def merge_tiles(
    features: Float[Tensor, "N P D"],
    size: ImageSize,
    config: ImageConfig,
    vision: VisionConfig,
    *,
    newline: Float[Tensor, " D"] | None,
    projector: ProjectorConfig | None = None,
) -> Float[Tensor, "n D"]:
    """One row of features per picture, as long as `num_tokens` says.

        flat            every tile after the other
        spatial         the base tile, then the joint map of the other tiles row by row
        spatial_unpad   the same without the padding, `newline` at the end of every row

    Args:
        features: the base tile first, then the tiles row by row.
        size: the picture before it was resized.
        config: aspect, merge and resolutions.
        vision: the tower that made the features: its grid and its image_size.
        newline: the learned end of a row, or None. A single tile gets one at its end when the
            merge is spatial_unpad; the original passes none for a picture that was never tiled.
        projector: what the features went through, where it joined some; None: it did not.

    Raises:
        ConfigError: features that have no place in a map: a kept class token, a resampler's.
        FusionError: the tiles do not make up the grid that the picture's size asks for.

    Source: LLaVA llava_arch.py, prepare_inputs_labels_for_multimodal.
    """
    if config.merge == "flat":
        return features.flatten(0, 1)
    base = features[0]
    unpads = config.merge == "spatial_unpad"
    if features.shape[0] == 1:
        return torch.cat([base, newline[None]]) if unpads and newline is not None else base
    joint = _joint_map(features[1:], size, config, vision, projector)  # [H, W, D]
    if unpads:
        margins = unpad_margins(
            size, Grid(joint.shape[0], joint.shape[1]), rounds=config.rounds_unpad
        )
        joint = joint[
            margins.rows : joint.shape[0] - margins.rows,
            margins.columns : joint.shape[1] - margins.columns,
        ]
        if newline is not None:
            ends = newline.expand(joint.shape[0], 1, -1)
            joint = torch.cat([joint, ends], dim=1)
    return torch.cat([base, joint.flatten(0, 1)])


def _joint_map(
    tiles: Float[Tensor, "N P D"],
    size: ImageSize,
    config: ImageConfig,
    vision: VisionConfig,
    projector: ProjectorConfig | None,
) -> Float[Tensor, "H W D"]:
    """The features of a grid of tiles as one map."""
    if config.aspect != "anyres":
        raise FusionError(
            f"{1 + tiles.shape[0]} tiles and merge {config.merge!r}, but image_aspect_ratio is "
            f"{config.aspect!r}: only 'anyres' says how several tiles lie side by side"
        )
    tile = tile_features(vision, projector)
    places = features_grid(config, tile)
    grid = picture_grid(size, config, vision.image_size)
    expected = (grid.rows * grid.columns, tile.number)
    if tuple(tiles.shape[:2]) != expected:
        raise FusionError(
            f"a picture of {size} needs {expected[0]} tiles of {expected[1]} features after the "
            f"base tile, got {tiles.shape[0]} tiles of {tiles.shape[1]}"
        )
    split = tiles.reshape(*grid, *places, -1)  # [rows, columns, h, w, D]
    return split.transpose(1, 2).flatten(2, 3).flatten(0, 1)
