"""The fast attention equals its plain twin; masks say who sees whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.nn.attention import attend, attend_plain, causal_mask

CPU = torch.device("cpu")


def _sees(query: int, key: int, window: int | None, valid: list[bool]) -> bool:
    """The rule, one pair at a time."""
    if query == key:
        return True
    near = window is None or query - key < window
    return key < query and near and valid[key]


@st.composite
def situations(draw):
    queries = draw(st.integers(1, 6))
    keys = queries + draw(st.integers(0, 5))
    window = draw(st.none() | st.integers(1, 12))
    padding = draw(st.none() | st.lists(st.integers(0, keys - 1), min_size=1, max_size=3))
    return queries, keys, window, padding


def _valid(padding, keys):
    if padding is None:
        return None
    return torch.tensor([[i >= p for i in range(keys)] for p in padding])


@given(situations())
def test_mask_follows_the_rule(situation):
    queries, keys, window, padding = situation
    valid = _valid(padding, keys)
    mask = causal_mask(valid, queries, keys, window=window, device=CPU)
    rows = [[True] * keys] if valid is None else valid.tolist()
    expected = torch.tensor(
        [[[[_sees(q, k, window, row) for k in range(keys)]] for q in range(keys - queries, keys)]
         for row in rows]
    ).transpose(1, 2)  # fmt: skip
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    assert torch.equal(mask.expand(expected.shape), expected)


def test_no_mask_is_made_where_plain_causal_is_meant():
    full = torch.ones(2, 5, dtype=torch.bool)
    assert causal_mask(full, 5, 5, window=5, device=CPU) is None
    assert causal_mask(full, 1, 5, device=CPU) is None
    assert causal_mask(None, 2, 5, device=CPU) is not None
    assert causal_mask(full, 5, 5, window=4, device=CPU) is not None


@given(
    situations(),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.3]),
    st.integers(0, 2**16),
)
def test_attend_equals_its_plain_twin(situation, heads, scale, seed):
    queries, keys, window, padding = situation
    generator = torch.Generator().manual_seed(seed)
    batch = 2 if padding is None else len(padding)
    mask = causal_mask(_valid(padding, keys), queries, keys, window=window, device=CPU)
    q, k, v = (
        torch.randn(batch, n, t, 8, generator=generator, dtype=torch.float64)
        for n, t in ((heads[0], queries), (heads[1], keys), (heads[1], keys))
    )
    torch.testing.assert_close(
        attend(q, k, v, mask=mask, scale=scale), attend_plain(q, k, v, mask=mask, scale=scale)
    )


@pytest.mark.parametrize("queries", [1, 4])
def test_additive_bias_of_every_head(queries):
    q = torch.randn(2, 4, queries, 8)
    k, v = torch.randn(2, 2, 2, 6, 8)
    bias = torch.randn(2, 4, queries, 6)
    torch.testing.assert_close(attend(q, k, v, mask=bias), attend_plain(q, k, v, mask=bias))


def test_gradients_equal_those_of_the_plain_twin():
    inputs = [torch.randn(1, h, 5, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    mask = causal_mask(torch.tensor([[False, False, True, True, True]]), 5, 5, device=CPU)
    found = torch.autograd.grad(attend(*inputs, mask=mask).square().sum(), inputs)
    expected = torch.autograd.grad(attend_plain(*inputs, mask=mask).square().sum(), inputs)
    torch.testing.assert_close(found, expected)
