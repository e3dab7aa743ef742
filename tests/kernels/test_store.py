"""Positions land in their places, wherever their heads lie, and nowhere else."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.kernels.library import Library
from lapilli.kernels.store import store_positions, store_reference


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    count=st.integers(0, 30),
    heads=st.integers(1, 4),
    size=st.sampled_from((1, 7, 16)),
    width=st.sampled_from((1, 8, 33)),
    heads_first=st.booleans(),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
        ]
    ),
    seed=st.integers(0, 99),
)
def test_equals_indexing(
    library: Library,
    count: int,
    heads: int,
    size: int,
    width: int,
    heads_first: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    del library
    torch.manual_seed(seed)
    dtype, kept_dtype = dtypes
    num_blocks = count // size + 3
    places = torch.randperm(num_blocks * size)[:count]
    blocks, offsets = places // size, places % size
    if heads_first:
        k, v = (torch.randn(heads, count, width).transpose(0, 1).to(dtype) for _ in range(2))
    else:
        k, v = (torch.randn(count, heads, width).to(dtype) for _ in range(2))
    memory = [torch.randn(num_blocks, heads, size, width).to(kept_dtype) for _ in range(2)]
    expected = [one.clone() for one in memory]
    store_reference(*expected, blocks, offsets, k, v)
    store_positions(*memory, blocks, offsets, k, v)
    assert torch.equal(memory[0], expected[0])
    assert torch.equal(memory[1], expected[1])


def test_special_numbers_are_rounded_as_torch_rounds(library: Library) -> None:
    del library
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, -1, 0x7FC00000]
    )
    x = bits.to(torch.int32).view(torch.float32).repeat(2, 1)[:, None]  # ties, overflow, inf, NaN
    memory = [torch.zeros(1, 1, 2, x.shape[-1], dtype=torch.bfloat16) for _ in range(2)]
    place = (torch.zeros(2, dtype=torch.long), torch.arange(2))
    store_positions(*memory, *place, x, -x)
    torch.testing.assert_close(memory[0][0, 0], x[:, 0].bfloat16(), atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(memory[1][0, 0], -x[:, 0].bfloat16(), atol=0, rtol=0, equal_nan=True)
