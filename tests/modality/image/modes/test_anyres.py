"""How many tiles and features a picture becomes."""

import pytest

from lapilli.config.model import ImageConfig, PixelConfig, VisionConfig
from lapilli.errors import ConfigError
from lapilli.geometry import Grid, ImageSize
from lapilli.modality.image.modes.anyres import MODE
from tests.modality.image.build import (
    PINPOINTS,
    image_config,
    num_tiles,
    num_tokens,
    vision_config,
)

TOWER = vision_config(336)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 1000, 2928),
        (640, 480, 2340),
        (480, 640, 2352),
        (1920, 1080, 1948),
        (1080, 1920, 1968),
        (2000, 500, 1890),
        (500, 2000, 1944),
        (333, 1000, 2376),
        (336, 336, 1176),
        (100, 100, 1176),
        (1024, 683, 2144),
    ],
)
def test_counts_of_the_original(width, height, expected):
    config = image_config(336, "anyres", "spatial_unpad")
    assert num_tokens(ImageSize(height, width), config, TOWER) == expected


def test_spatial_keeps_the_padding_and_has_no_newline():
    config = image_config(336, "anyres", "spatial")
    assert num_tokens(ImageSize(1000, 1000), config, TOWER) == 2880
    assert num_tokens(ImageSize(900, 1000), config, TOWER, has_newline=False) == 2880


def test_flat_counts_every_tile():
    config = image_config(336, "anyres", "flat")
    assert num_tokens(ImageSize(1000, 1000), config, TOWER) == 5 * 576
    assert num_tiles(ImageSize(1000, 1000), config, 336) == 5


def test_unpad_without_a_newline_vector():
    config = image_config(336, "anyres", "spatial_unpad")
    assert num_tokens(ImageSize(336, 336), config, TOWER, has_newline=False) == 576 + 24 * 24


@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_a_single_tile(aspect):
    size = ImageSize(10, 2000)
    assert num_tokens(size, image_config(336, aspect, "flat"), TOWER) == 576
    unpad = image_config(336, aspect, "spatial_unpad")
    assert num_tokens(size, unpad, TOWER, has_newline=True) == 577
    assert num_tokens(size, unpad, TOWER, has_newline=False) == 576


def test_an_extreme_picture_leaves_only_its_base_tile():
    config = image_config(336, "anyres", "spatial_unpad")
    assert num_tokens(ImageSize(20, 2000), config, TOWER) == 576


def test_class_token_counts_when_flat_and_is_refused_in_a_map():
    tower = vision_config(336, feature_select="cls_patch")
    assert num_tokens(ImageSize(9, 9), image_config(336, "square", "flat"), tower) == 577
    with pytest.raises(ConfigError, match=r"'cls_patch' keeps the class token \(577"):
        num_tokens(ImageSize(9, 9), image_config(336, "anyres", "spatial"), tower)


def test_a_resolution_that_is_no_multiple_of_the_tile():
    config = image_config(336, "anyres", "flat", pinpoints=(ImageSize(336, 700),))
    with pytest.raises(ConfigError, match="700x336, which is not a whole number of 336x336"):
        MODE.grid(ImageSize(1, 1), config, 336)


def test_grid_is_rows_then_columns():
    config = image_config(336, "anyres", "flat")
    assert MODE.grid(ImageSize(300, 1000), config, 336) == Grid(1, 3)
    assert len(PINPOINTS) == 5


def test_siglip_has_no_class_token():
    tower = VisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        family="siglip",
        feature_select="cls_patch",
    )
    config = ImageConfig(pixels=PixelConfig(crop_size=ImageSize(56, 56)))
    assert num_tokens(ImageSize(5, 5), config, tower) == 16
