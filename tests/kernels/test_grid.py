"""Weights of 4 bits on a grid: the search and its twin, the layout, and the largest numbers."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.kernels.grid import round_grid, round_grid_native, round_grid_reference
from lapilli.kernels.library import Library
from lapilli.kernels.packing import Grid, Packed, pack4, unpack4
from lapilli.quant import QuantConfig
from lapilli.quant.quantize import round4
from tests.kernels.test_linear import assert_close, exact, one

sizes = st.tuples(st.integers(1, 40), st.integers(1, 300))


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Rows like those of a model: most weights small, some chunks off their middle."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * 0.02
    weight *= torch.rand(shape[0], 1, generator=random) + 0.2
    weight[:, : shape[1] // 4] += 0.03
    weight[shape[0] // 2] *= 6.0
    return weight


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=sizes, group=st.sampled_from((64, 128)), seed=st.integers(0, 99))
def test_the_search_finds_what_its_twin_finds(
    library: Library, shape: tuple[int, int], group: int, seed: int
) -> None:
    weight = weights(shape, seed)
    found = round_grid_native(library, weight, None, group)
    expected = round_grid_reference(weight, None, group)
    assert found.data.shape == expected.data.shape
    miss, expected_miss = (
        (packed.dequantize() - weight).norm().item() for packed in (found, expected)
    )
    assert miss == pytest.approx(expected_miss, rel=1e-3, abs=1e-9)
    # Sums in another order may decide otherwise between choices that are equally good.
    differ = found.dequantize() != expected.dequantize()
    assert differ.float().mean().item() < 0.02 or int(differ.any(dim=1).sum()) <= 1


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 40), chunks=st.integers(1, 9), seed=st.integers(0, 99))
def test_steps_and_centers_come_back(rows: int, chunks: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 17, (rows, chunks), generator=random)
    centers = torch.randint(-128, 128, (rows, chunks), generator=random)
    back = Grid.pack(steps, centers).unpack()
    assert torch.equal(back[0][:rows], steps.int())
    assert torch.equal(back[1][:rows], centers.int())
    assert (back[0][rows:] == 1).all()
    assert not back[1][rows:].any()


def test_it_is_nearer_than_scales_alone_at_about_the_bits() -> None:
    weight = weights((64, 512))
    grid = round_grid(weight, None)
    alone = round4(weight, None, QuantConfig(group_size=32, levels="symmetric"))
    assert grid.num_bytes == alone.num_bytes == weight.numel() * 4.5 / 8
    misses = [(packed.dequantize() - weight).square().mean() for packed in (grid, alone)]
    assert misses[0] < 0.75 * misses[1]


def test_brackets_fit_into_a_byte() -> None:
    weight = weights((48, 384))
    weight[3, 5], weight[4, 100] = 9.0, -9.0
    packed = round_grid(weight, None)
    assert packed.grid is not None
    steps, centers = packed.grid.unpack()
    nibbles = unpack4(packed.data).int().view(len(steps), -1, 32)
    brackets = centers[..., None] + steps[..., None] * (nibbles - 8)
    assert brackets.min() >= -128
    assert brackets.max() <= 127


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 61])
def test_the_largest_numbers_do_not_overflow(library: Library, tokens: int) -> None:
    """Sums of a chunk reach 32 * 8 * 127 = 32512, which 16 bits just hold."""
    shape = (32, 256)
    nibbles = torch.zeros(shape, dtype=torch.uint8)
    nibbles[1::2] = 15
    steps = torch.full((32, 8), 16)
    packed = Packed(
        pack4(nibbles), torch.ones(2, 2, 16).half(), None, None, *shape, 128, 4,
        grid=Grid.pack(steps, torch.zeros(32, 8, dtype=torch.int)),
    )  # fmt: skip
    x = torch.ones(tokens, 256)
    x[tokens // 2] = -1.0
    x[tokens - 1, ::2] *= -1.0
    assert_close(one(library, x, packed), exact(x, packed, weight_only=False))
    found = one(library, x, packed, weight_only=True)
    assert_close(found, exact(x, packed, weight_only=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_what_is_no_weight_is_refused(library: Library, bad: float) -> None:
    weight = weights((20, 96))
    weight[17, 70] = bad
    with pytest.raises(ConfigError, match="do not fit into 4 bits"):
        round_grid_native(library, weight, None, 128)
    with pytest.raises(ConfigError, match="do not fit into 4 bits"):
        round_grid_reference(weight, None, 128)
    with pytest.raises(ConfigError, match="groups of 64 or 128 inputs, found 32"):
        round_grid(weight, None, 32)
