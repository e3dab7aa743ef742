"""Weights of 4 bits with nonlinear levels: the search, its twin, the largest numbers."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.kernels.levels import round_levels, round_levels_native, round_levels_reference
from lapilli.kernels.library import Library
from lapilli.kernels.packing import LEVELS, SPAN, Packed, pack4, unpack4
from lapilli.quant import QuantConfig
from lapilli.quant.quantize import round4
from tests.kernels.test_linear import assert_close, exact, one

sizes = st.tuples(st.integers(1, 40), st.integers(1, 300))


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Rows like those of a model: most weights small, some spans off their middle, a large row."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * 0.02
    weight *= torch.rand(shape[0], 1, generator=random) + 0.2
    weight[:, : shape[1] // 4] += 0.03
    weight[shape[0] // 2] *= 6.0
    return weight


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=sizes, seed=st.integers(0, 99))
def test_the_search_finds_what_its_twin_finds(
    library: Library, shape: tuple[int, int], seed: int
) -> None:
    weight = weights(shape, seed)
    found = round_levels_native(library, weight, None, 128)
    expected = round_levels_reference(weight, None, 128)
    assert found.data.shape == expected.data.shape
    # Sums in another order decide otherwise between choices that are about equally good.
    miss, expected_miss = (
        (packed.dequantize() - weight).norm(dim=1) for packed in (found, expected)
    )
    torch.testing.assert_close(miss.norm(), expected_miss.norm(), rtol=0.01, atol=1e-6)
    assert ((miss - expected_miss).abs() <= 0.1 * expected_miss + 1e-4 * weight.norm(dim=1)).all()


def test_it_is_nearer_than_linear_levels_at_about_the_bits() -> None:
    weight = weights((64, 512))
    packed = round_levels(weight, None)
    alone = round4(weight, None, QuantConfig(group_size=32, levels="symmetric"))
    assert alone.num_bytes == weight.numel() * 4.5 / 8
    assert packed.num_bytes == alone.num_bytes + 64 * 4  # and a scale for every row
    misses = [(each.dequantize() - weight).square().mean() for each in (packed, alone)]
    assert misses[0] < 0.75 * misses[1]


@settings(deadline=None, max_examples=25)
@given(shape=sizes, seed=st.integers(0, 99))
def test_no_other_level_of_a_span_is_nearer(shape: tuple[int, int], seed: int) -> None:
    weight = weights(shape, seed)
    packed = round_levels_reference(weight, None, 128)
    back = packed.dequantize()
    scales = packed.span_scales.transpose(1, 2).reshape(-1, packed.span_scales.shape[1])
    steps = (scales * packed.scales.view(-1, 1)).repeat_interleave(SPAN, dim=1)
    steps = steps[: shape[0], : shape[1]]
    every = steps[..., None] * torch.tensor(LEVELS)
    nearest = (every - weight[..., None]).abs().amin(-1)
    assert ((back - weight).abs() <= nearest * (1 + 1e-4) + 1e-6 * weight.abs().max()).all()
    assert unpack4(packed.data).max() <= 15


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 61])
def test_the_largest_numbers_do_not_overflow(library: Library, tokens: int) -> None:
    """A level, a scale and an activation are 127 at most, and all of them are here."""
    shape = (32, 256)
    nibbles = torch.zeros(shape, dtype=torch.uint8)
    nibbles[1::2] = 15
    spans = torch.full((2, 256 // SPAN, 16), 127, dtype=torch.int8)
    spans[1] = -127
    packed = Packed(
        pack4(nibbles), torch.ones(2, 16), None, None, *shape, 128, 4, span_scales=spans
    )
    x = torch.ones(tokens, 256)
    x[tokens // 2] = -1.0
    x[tokens - 1, ::2] *= -1.0
    assert_close(one(library, x, packed), exact(x, packed, weight_only=False))
    found = one(library, x, packed, weight_only=True)
    assert_close(found, exact(x, packed, weight_only=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_weight_is_refused(library: Library, bad: float) -> None:
    weight = weights((20, 96))
    weight[17, 70] = bad
    with pytest.raises(ConfigError, match="do not fit into 4 bits"):
        round_levels_native(library, weight, None, 128)
    with pytest.raises(ConfigError, match="do not fit into 4 bits"):
        round_levels_reference(weight, None, 128)
