"""Projectors: names and numbers of the original, and those that join features."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.config.model import ProjectorConfig, VisionConfig
from lapilli.errors import ConfigError, FusionError
from lapilli.geometry import Grid
from lapilli.modality.projector import average_neighbours, build_projector
from lapilli.modality.vector import VectorModality

VISION = VisionConfig(
    image_size=28, patch_size=7, hidden_size=6, intermediate_size=8, num_layers=1, num_heads=1
)  # 4x4 patches


def _config(**changes) -> ProjectorConfig:
    return ProjectorConfig(**{"kind": "mlp", "vision_size": 6, "hidden_size": 4, **changes})


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (_config(kind="linear"), ["weight", "bias"]),
        (_config(depth=1), ["0.weight", "0.bias"]),
        (_config(depth=2), ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (_config(depth=3, bias=False), ["0.weight", "2.weight", "4.weight"]),
        (_config(kind="identity", hidden_size=6), []),
    ],
)
def test_parameter_names(config, names):
    assert list(build_projector(config).state_dict()) == names


def test_mlp_uses_the_exact_gelu():
    projector = build_projector(_config(depth=2)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    first, second = projector[0], projector[2]
    inner = x @ first.weight.T + first.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(projector(x), inner @ second.weight.T + second.bias)


def test_mlp_follows_the_activation_of_its_configuration():
    assert isinstance(build_projector(_config(depth=2, activation="relu"))[1], nn.ReLU)


def test_identity_returns_its_input():
    x = torch.randn(2, 6)
    assert build_projector(_config(kind="identity", hidden_size=6))(x) is x


def test_identity_between_widths_is_refused():
    with pytest.raises(ConfigError, match="features of width 6 into 4"):
        build_projector(_config(kind="identity"))


# ---- projectors that join features


def build(**fields):
    torch.manual_seed(0)
    config = ProjectorConfig(**{"vision_size": 6, "hidden_size": 8, "depth": 2, **fields})
    return build_projector(config, VISION).double().eval()


def tiles(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 16, 6, generator=generator, dtype=torch.float64)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_means_of_neighbours_are_torchs_average_pooling(rows, columns, side, number):
    grid = Grid(rows * side, columns * side)
    values = torch.arange(number * grid.rows * grid.columns * 2, dtype=torch.float64).sin()
    features = values.reshape(number, -1, 2)
    image = features.transpose(1, 2).unflatten(2, grid)
    expected = functional.avg_pool2d(image, side).flatten(2).transpose(1, 2)
    torch.testing.assert_close(average_neighbours(features, grid, side), expected)


def test_before_and_after_the_mlp():
    plain, before, after = (
        build(kind="mlp", pool=pool, pool_at=at)
        for pool, at in ((1, "input"), (2, "input"), (2, "output"))
    )
    assert plain.state_dict().keys() == before.state_dict().keys() == after.state_dict().keys()
    x, grid = tiles(2), VISION.grid
    torch.testing.assert_close(before(x), plain(average_neighbours(x, grid, 2)))
    torch.testing.assert_close(after(x), average_neighbours(plain(x), grid, 2))


@pytest.mark.parametrize(
    "fields", [{"kind": "mlp", "pool": 2}, {"kind": "resampler", "num_queries": 3}]
)
def test_tiles_in_a_row_equal_tiles_in_a_batch(fields):
    projector, x = build(**fields), tiles(3)
    together = projector(x)
    assert together.shape[0] == 3
    torch.testing.assert_close(projector(x.flatten(0, 1)), together.flatten(0, 1))
    torch.testing.assert_close(projector(x[1:2])[0], together[1])


@pytest.mark.parametrize(
    "fields", [{"kind": "mlp", "pool": 2}, {"kind": "resampler", "num_queries": 3}]
)
def test_half_a_tile_is_refused(fields):
    with pytest.raises(FusionError, match=r"joins the 16 features of a tile.*\[24, 6\]"):
        build(**fields)(torch.zeros(24, 6, dtype=torch.float64))


def test_pooling_needs_a_tower():
    config = ProjectorConfig(kind="mlp", vision_size=6, hidden_size=8, pool=2)
    with pytest.raises(ConfigError, match="2x2 neighbours needs features that lie on a tower"):
        build_projector(config)


def test_a_resampler_does_not_know_the_order_of_features():
    projector, x = build(kind="resampler", num_queries=3), tiles(1)
    torch.testing.assert_close(projector(x.flip(1)), projector(x))


def test_every_parameter_of_a_resampler_learns():
    projector = build(kind="resampler", num_queries=3).train()
    projector(tiles(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in projector.parameters())


def test_heads_are_64_wide_where_that_divides():
    for width, heads in ((256, 4), (24, 3)):
        projector = build(kind="resampler", num_queries=2, hidden_size=width)
        assert projector.layers[0].num_heads == heads


def test_items_of_any_number_of_vectors_take_the_same_positions():
    torch.manual_seed(0)
    config = ProjectorConfig(kind="resampler", vision_size=5, hidden_size=8, num_queries=3)
    modality = VectorModality(config, name="user").eval()
    items = [modality.prepare(torch.randn(number, 5)) for number in (1, 7, 40)]
    features = modality.embed(items)
    assert [modality.num_tokens(item) for item in items] == [3, 3, 3]
    assert [tuple(f.shape) for f in features] == [(3, 8)] * 3
    torch.testing.assert_close(modality.embed(items[1:2])[0], features[1])
