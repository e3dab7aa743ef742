"""Scales in a byte: each becomes the nearest value of its block, slices are those of the whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.quant.scales import ExactScales, RoundedScales, dynamic_values


def drawn(rows, blocks):
    random = torch.Generator().manual_seed(1000 * rows + blocks)
    return torch.randn(rows, blocks, generator=random).abs() + 0.1


def test_the_values_of_a_byte():
    values = dynamic_values()
    assert len(values.unique()) == 256
    assert values.max() == 1
    assert values.min() == -(1 - 0.9 / 128)
    found = values.abs()
    decades = [((found > 10.0**-at) & (found < 10.0 ** (1 - at))).sum() for at in range(1, 8)]
    assert decades == [128, 64, 32, 16, 8, 4, 2]


@given(st.integers(1, 40), st.integers(1, 30))
def test_every_scale_becomes_the_nearest_value_of_its_block(rows, blocks):
    scales = drawn(rows, blocks)
    rounded = RoundedScales(scales)
    line, found = scales.flatten(), rounded.rows(0, rows).flatten()
    mean = line.mean()
    for start in range(0, len(line), 256):
        block = line[start : start + 256] - mean
        choices = dynamic_values() * block.abs().max()
        nearest = (choices - block[:, None]).abs().amin(1)
        moved = (found[start : start + 256] - mean - block).abs()
        torch.testing.assert_close(moved, nearest, atol=1e-6, rtol=1e-4)
    half = rows // 2
    parts = [rounded.rows(0, half), rounded.rows(half, rows)]
    assert torch.equal(torch.cat(parts), rounded.rows(0, rows))
    assert torch.equal(ExactScales(scales).rows(half, rows), scales[half:])


def test_equal_scales_stay_what_they_are():
    scales = torch.full((3, 5), 0.25)
    assert torch.equal(RoundedScales(scales).rows(0, 3), scales)
