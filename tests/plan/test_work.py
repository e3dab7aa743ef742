import dataclasses

import pytest

from lapilli.config.model import ImageConfig, ModelConfig, PixelConfig, TokenConfig
from lapilli.config.projector import parse_projector
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize
from lapilli.plan import CAPTIONS_558K, MIX_665K, plan, usual_work
from lapilli.train.recipe import Recipe
from tests.plan.test_plan import SEVEN_B
from tests.train.conftest import new_recipe

ONE_TILE = ImageConfig(pixels=PixelConfig(crop_size=ImageSize(336, 336), shortest_edge=336))
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TILES = dataclasses.replace(
    ONE_TILE,
    aspect="anyres",
    merge="spatial_unpad",
    pinpoints=tuple(ImageSize(*size) for size in PINPOINTS),
)
ALIGN = dataclasses.replace(new_recipe(), stage="align")


def instruct(max_length) -> Recipe:
    recipe = new_recipe()
    data = dataclasses.replace(recipe.data, max_length=max_length)
    return dataclasses.replace(recipe, stage="instruct", data=data)


def test_a_tile_per_picture_is_the_work_of_the_original():
    config = dataclasses.replace(SEVEN_B, image=ONE_TILE)
    assert usual_work(ALIGN, config) == CAPTIONS_558K
    short = dataclasses.replace(ALIGN.data, max_length=640)
    assert usual_work(dataclasses.replace(ALIGN, data=short), config).longest == 640
    assert usual_work(instruct(2048), config) == MIX_665K


def test_tiles_are_those_of_a_picture_of_640_x_480():
    """A base tile and four of 48 x 48 features; 36 rows are picture, a newline at their ends."""
    config = dataclasses.replace(SEVEN_B, image=TILES, has_newline=True)
    more = 36 * 49
    work = usual_work(instruct(4096), config)
    assert (work.tiles, work.positions, work.longest) == (5, 1100 + more, 4096)
    assert work.supervised == MIX_665K.supervised
    wide = dataclasses.replace(ALIGN, data=dataclasses.replace(ALIGN.data, max_length=4096))
    captions = usual_work(wide, config)
    assert captions.positions == 610 + more
    assert captions.longest == 768 + 48 * 49  # where nothing is padding
    one = dataclasses.replace(SEVEN_B, image=ONE_TILE)
    tower = [
        plan(instruct(4096), each, 1, work=usual_work(instruct(4096), each)).flops.tower
        for each in (one, config)
    ]
    assert tower[1] == pytest.approx(5 * tower[0])


def test_projectors_that_join_features_leave_shorter_rows():
    projector = parse_projector("mlp2x_gelu_pool2x2", vision_size=1024, hidden_size=4096)
    config = dataclasses.replace(SEVEN_B, image=ONE_TILE, projector=projector)
    work = usual_work(instruct(2048), config)
    assert (work.tiles, work.positions) == (1, 1100 - 576 + 144)


def test_a_model_that_reads_text_has_no_plan():
    config = ModelConfig(text=SEVEN_B.text, tokens=TokenConfig())
    assert usual_work(instruct(2048), config) == MIX_665K
    with pytest.raises(ConfigError, match="reads text"):
        plan(instruct(2048), config, 1)
