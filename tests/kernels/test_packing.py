"""The packed layout: what goes in comes out, padding included, and wrong shapes are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import ShapeMismatchError
from lapilli.kernels.packing import (
    Packed,
    by_block,
    by_row,
    pack4,
    pack8,
    round_rows,
    rounded,
    unpack4,
    unpack8,
)

sizes = st.tuples(st.integers(1, 70), st.integers(1, 200))


@settings(deadline=None, max_examples=50)
@given(shape=sizes, seed=st.integers(0, 99))
def test_bytes_and_nibbles_come_back(shape: tuple[int, int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    out, inputs = shape
    assert torch.equal(unpack8(pack8(values))[:out, :inputs], values)
    nibbles = values & 15
    back = unpack4(pack4(nibbles))
    assert torch.equal(back[:out, :inputs], nibbles)
    assert (back[out:] == 8).all()
    assert (back[:, inputs:] == 8).all()


def test_the_layout_is_the_drawn_one() -> None:
    values = torch.arange(16 * 32).remainder(16).to(torch.uint8).view(16, 32)
    values[3, 8 + 4 + 1] = 5  # row 3, step 1, high nibble, second of four
    values[3, 8 + 1] = 9
    data = pack4(values)
    assert data.shape == (1, 4, 64)
    assert int(data[0, 1, 3 * 4 + 1]) == 9 + 16 * 5
    wide = pack8(values)
    assert int(wide[0, 2, 3 * 4 + 1]) == 9


def test_facts_by_block_come_back() -> None:
    facts = torch.randn(37, 3)
    assert torch.equal(by_row(by_block(facts))[:37], facts)


def test_rounding_is_by_token_and_group() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0] * 8 + [100.0] + [0.0] * 31, [0.0] * 64])
    values, scale = round_rows(x, 32)
    assert values.shape == (2, 2, 32)
    assert values[0, 0, :4].tolist() == [64, -127, 32, 0]  # 63.5 and 31.75: halves to even
    assert scale[0, :, 0].tolist() == pytest.approx([2 / 127, 100 / 127])
    assert not values[1].any()
    assert torch.equal(rounded(x, 32)[1], torch.zeros(64))


def test_wrong_shapes_are_refused() -> None:
    data = torch.zeros(1, 4, 64, dtype=torch.uint8)
    with pytest.raises(ShapeMismatchError, match=r"packed scales: expected torch\.float16 \[1, 1"):
        Packed(data, torch.zeros(1, 16), None, None, 16, 32, 32, 4)
    with pytest.raises(ShapeMismatchError, match=r"packed data: expected torch\.uint8 \[2, 4, 64"):
        Packed(data, torch.zeros(1, 1, 16).half(), None, None, 17, 32, 32, 4)
