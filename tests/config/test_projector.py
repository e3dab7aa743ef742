"""Names of projectors: what is written is read again, and what cannot be pooled is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.config.model import ProjectorConfig, VisionConfig
from lapilli.config.projector import parse_projector, projector_name, tile_features
from lapilli.errors import ConfigError, UnsupportedModelError
from tests.config.test_huggingface import original, parse

WIDTHS = {"vision_size": 1024, "hidden_size": 4096}


def tower(patches=24, **changes):
    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_layers": 2, "num_heads": 2}
    return VisionConfig(image_size=14 * patches, patch_size=14, **{**sizes, **changes})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp2x_gelu", {"kind": "mlp", "depth": 2}),
        ("pool2x2_mlp2x_gelu", {"kind": "mlp", "depth": 2, "pool": 2}),
        ("mlp3x_gelu_pool4x4", {"kind": "mlp", "depth": 3, "pool": 4, "pool_at": "output"}),
        ("resampler144", {"kind": "resampler", "num_queries": 144}),
        ("resampler16x3", {"kind": "resampler", "num_queries": 16, "depth": 3}),
        ("linear", {"kind": "linear"}),
    ],
)
def test_names(name, expected):
    assert parse_projector(name, **WIDTHS) == ProjectorConfig(**WIDTHS, **expected)


kinds = st.one_of(
    st.builds(
        dict,
        kind=st.just("mlp"),
        depth=st.integers(1, 9),
        pool=st.integers(2, 12),
        pool_at=st.sampled_from(["input", "output"]),
    ),
    st.builds(dict, kind=st.just("mlp"), depth=st.integers(1, 9)),
    st.builds(
        dict, kind=st.just("resampler"), depth=st.integers(1, 12), num_queries=st.integers(1, 999)
    ),
)


@given(kinds)
def test_what_is_written_is_read_again(fields):
    config = ProjectorConfig(**WIDTHS, **fields)
    assert parse_projector(projector_name(config), **WIDTHS) == config


@pytest.mark.parametrize(
    "name", ["pool2x3_mlp2x_gelu", "pool2x2_mlp2x_gelu_pool2x2", "resampler", "pool2x2_linear"]
)
def test_other_names_are_refused_with_those_that_exist(name):
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*choose from linear, .*resamplerMxN"):
        parse_projector(name, **WIDTHS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "linear", "pool": 2}, r"linear projector with pool 2.*mlp1x_gelu"),
        ({"kind": "mlp", "pool": 0}, "pool 0: expected 1, or more"),
        ({"kind": "resampler"}, "num_queries 0: expected at least 1"),
        ({"kind": "mlp", "num_queries": 4}, "num_queries 4: expected .* 0 for every other"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ConfigError, match=message):
        ProjectorConfig(**WIDTHS, **fields)


@pytest.mark.parametrize(
    ("name", "number", "grid"),
    [
        ("mlp2x_gelu", 576, (24, 24)),
        ("pool2x2_mlp2x_gelu", 144, (12, 12)),
        ("mlp2x_gelu_pool3x3", 64, (8, 8)),
        ("resampler144", 144, None),
    ],
)
def test_features_of_a_tile(name, number, grid):
    found = tile_features(tower(), parse_projector(name, **WIDTHS))
    assert (found.number, found.grid) == (number, grid)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (tower(27), r"2x2 neighbours of 27x27 patches: 2 must divide both"),
        (tower(feature_select="cls_patch"), r"2x2 neighbours: 'cls_patch' keeps the class token"),
    ],
)
def test_what_cannot_be_pooled(vision, message):
    with pytest.raises(ConfigError, match=message):
        tile_features(vision, parse_projector("pool2x2_mlp2x_gelu", **WIDTHS))


def test_config_json_says_it():
    config, report = parse(original(mm_projector_type="pool2x2_mlp2x_gelu"))
    assert (config.projector.pool, config.projector.pool_at) == (2, "input")
    assert report.unknown == ()
    with pytest.raises(ConfigError, match="3x3 neighbours of 4x4 patches"):
        parse(original(mm_projector_type="pool3x3_mlp2x_gelu"))
