"""Small configurations that the tests of this folder share."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from lapilli.config.model import ImageConfig, Merge, PixelConfig, VisionConfig
from lapilli.config.projector import tile_features
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes import mode_of
from lapilli.modality.image.pixels import PreparedImage

# The resolutions of the published 1.6 checkpoints in tiles, (columns, rows).
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def image_config(
    tile: int,
    aspect: str = "square",
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


def prepare(
    image: Image.Image, config: ImageConfig, vision: VisionConfig | None = None
) -> PreparedImage:
    """The tiles of a picture, as its mode makes them."""
    return mode_of(config).prepare(image, config, vision)


def num_tiles(size: ImageSize, config: ImageConfig, side: int) -> int:
    """Tiles of a picture, as its mode counts them."""
    return mode_of(config).num_tiles(size, config, side)


def num_tokens(
    size: ImageSize, config: ImageConfig, vision: VisionConfig, *, has_newline: bool = True
) -> int:
    """Features of a picture behind a projector that joins none."""
    tile = tile_features(vision)
    return mode_of(config).num_tokens(size, config, tile, has_newline=has_newline)


def join(
    features: torch.Tensor,
    size: ImageSize,
    config: ImageConfig,
    vision: VisionConfig,
    *,
    newline: torch.Tensor | None,
) -> torch.Tensor:
    """The row of a picture behind a projector that joins none."""
    return mode_of(config).join(features, size, config, tile_features(vision), newline=newline)


def cases_of(conformance: Path, op: str) -> Iterator[tuple[dict, Path, Path]]:
    """Every case of an op, with the folder of its images and its arrays."""
    for path in sorted((conformance / "cases").glob("*/_images/cases.json")):
        images = conformance / "images" / path.parts[-3]
        for case in json.loads(path.read_text("utf-8"))["cases"]:
            if case["op"] == op:
                yield case, images, path.with_name("arrays.npz")


def opened(path: Path, *, convert: bool = True) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image.convert("RGB") if convert else image
