"""Small configurations that the tests of this folder share."""

from lapilli.config.model import Aspect, ImageConfig, Merge, PixelConfig, VisionConfig
from lapilli.geometry import ImageSize

# The resolutions of the published 1.6 checkpoints in tiles, (columns, rows).
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def image_config(
    tile: int,
    aspect: Aspect = "square",
    merge: Merge = "flat",
    *,
    pinpoints: tuple[ImageSize, ...] | None = None,
    rounds_unpad: bool = False,
) -> ImageConfig:
    """The original's preprocessing for a tower of `tile` pixels."""
    if pinpoints is None:
        pinpoints = tuple(ImageSize(rows * tile, columns * tile) for columns, rows in PINPOINTS)
    return ImageConfig(
        pixels=PixelConfig(crop_size=ImageSize(tile, tile), shortest_edge=tile),
        aspect=aspect,
        merge=merge,
        pinpoints=pinpoints,
        rounds_unpad=rounds_unpad,
    )


def vision_config(tile: int, feature_select: str = "patch") -> VisionConfig:
    """A CLIP tower with patches of 14 pixels."""
    return VisionConfig(
        image_size=tile,
        patch_size=14,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        feature_select=feature_select,
    )
