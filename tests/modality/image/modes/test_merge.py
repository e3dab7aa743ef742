"""From the features of tiles to one row, against a plain account in nested lists."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import ConfigError, FusionError
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes.anyres import MODE
from tests.modality.image.build import image_config, join, num_tiles, num_tokens, vision_config

TOWER = vision_config(28)  # 2x2 patches
NEWLINE = torch.full((3,), -1.0)
sizes = st.one_of(
    st.builds(ImageSize, st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([ImageSize(1, 1), ImageSize(20, 2000), ImageSize(2000, 20)]),
)


def numbered(tiles: int) -> torch.Tensor:
    """Features whose first number is their position."""
    values = torch.arange(tiles * 4, dtype=torch.float32).reshape(tiles, 4, 1)
    return values.expand(tiles, 4, 3).contiguous()


@given(
    sizes,
    st.sampled_from(["square", "pad", "anyres"]),
    st.sampled_from(["flat", "spatial", "spatial_unpad"]),
    st.booleans(),
    st.booleans(),
)
def test_as_many_features_as_num_tokens_says(size, aspect, merge, has_newline, rounds):
    config = image_config(28, aspect, merge, rounds_unpad=rounds)
    features = numbered(num_tiles(size, config, 28))
    newline = NEWLINE if has_newline else None
    merged = join(features, size, config, TOWER, newline=newline)
    assert merged.shape[0] == num_tokens(size, config, TOWER, has_newline=has_newline)


@pytest.mark.slow
@given(sizes)
def test_spatial_reads_the_whole_map_row_by_row(size):
    config = image_config(28, "anyres", "spatial")
    grid = MODE.grid(size, config, 28)
    merged = join(numbered(1 + grid.rows * grid.columns), size, config, TOWER, newline=NEWLINE)
    expected = [0, 1, 2, 3]
    for row in range(grid.rows * 2):
        for column in range(grid.columns * 2):
            tile = 1 + (row // 2) * grid.columns + column // 2
            expected.append(tile * 4 + (row % 2) * 2 + column % 2)
    assert merged[:, 0].tolist() == expected


@pytest.mark.slow
@settings(deadline=None)  # the first call imports transformers
@given(sizes)
def test_unpad_agrees_with_transformers(size):
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    config = image_config(28, "anyres", "spatial_unpad", rounds_unpad=True)
    features = torch.randn(num_tiles(size, config, 28), 4, 3)
    theirs = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=28, patch_size=14),
            image_grid_pinpoints=[list(point) for point in config.pinpoints],
        )
    )
    expected, lengths = modeling.LlavaNextModel.pack_image_features(
        theirs, [features], [list(size)], "default", NEWLINE
    )
    assert num_tokens(size, config, TOWER) == lengths[0]
    merged = join(features, size, config, TOWER, newline=NEWLINE)
    assert torch.equal(merged, expected[0])


def test_unpad_cuts_the_padding_and_ends_rows():
    # 112 high, 28 wide: the map of the 1x3 tiles is 6 rows of 2; int(28 * 6 / 112) = 1 column
    # should stay, and (2 - 1) // 2 = 0 columns are cut off.
    config = image_config(28, "anyres", "spatial_unpad")
    merged = join(numbered(4), ImageSize(112, 28), config, TOWER, newline=NEWLINE)
    assert merged[:, 0].tolist() == [
        *[0, 1, 2, 3],
        *[4, 5, -1, 6, 7, -1, 8, 9, -1, 10, 11, -1, 12, 13, -1, 14, 15, -1],
    ]
    # A picture as wide as high leaves the middle of the 2x4 map: rows 1 and 2.
    merged = join(numbered(3), ImageSize(28, 28), config, TOWER, newline=NEWLINE)
    assert merged[:, 0].tolist() == [0, 1, 2, 3, 6, 7, -1, 8, 9, -1]
    without = join(numbered(3), ImageSize(28, 28), config, TOWER, newline=None)
    assert without[:, 0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]


def test_flat_appends_everything():
    config = image_config(28, "anyres", "flat")
    merged = join(numbered(3), ImageSize(28, 28), config, TOWER, newline=NEWLINE)
    assert merged[:, 0].tolist() == list(range(12))


def test_a_single_tile_gets_one_newline():
    config = image_config(28, "pad", "spatial_unpad")
    merged = join(numbered(1), ImageSize(9, 9), config, TOWER, newline=NEWLINE)
    assert merged[:, 0].tolist() == [0, 1, 2, 3, -1]


def test_too_few_tiles():
    config = image_config(28, "anyres", "spatial")
    with pytest.raises(FusionError, match=r"28x28 needs 2 tiles of 4 features .* got 3 tiles of 4"):
        join(numbered(4), ImageSize(28, 28), config, TOWER, newline=None)


def test_tiles_that_nothing_lays_out():
    config = image_config(28, "pad", "spatial")
    with pytest.raises(FusionError, match="image_aspect_ratio is 'pad'"):
        join(numbered(3), ImageSize(28, 28), config, TOWER, newline=None)


def test_class_token_in_a_map():
    tower = vision_config(28, feature_select="cls_patch")
    config = image_config(28, "anyres", "spatial")
    with pytest.raises(ConfigError, match="class token"):
        join(torch.zeros(3, 5, 3), ImageSize(28, 28), config, tower, newline=None)


def test_gradients_reach_features_and_newline():
    config = image_config(28, "anyres", "spatial_unpad")
    features = numbered(3).requires_grad_()
    newline = NEWLINE.clone().requires_grad_()
    join(features, ImageSize(28, 28), config, TOWER, newline=newline).sum().backward()
    assert newline.grad.tolist() == [2, 2, 2]
    assert features.grad[:, :, 0].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]
