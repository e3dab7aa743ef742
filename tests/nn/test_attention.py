"""The fast attention equals its plain twin, backwards too; masks say who sees whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.kernels.attention import prefill_reference
from lapilli.kernels.library import native
from lapilli.nn import attention
from lapilli.nn.attention import (
    FEWEST,
    LEAST_SHARED,
    attend,
    attend_plain,
    attention_backward,
    causal_mask,
    has_native_backward,
)
from lapilli.nn.linear import has_onednn

CPU = torch.device("cpu")


def _sees(query: int, window: int | None, valid: list[bool]) -> list[bool]:
    """The rule for one query: what is valid, near and not later; itself if that is nothing."""
    looks = [
        valid[key] and key <= query and (window is None or query - key < window)
        for key in range(len(valid))
    ]
    return looks if any(looks) else [key == query for key in range(len(valid))]


@st.composite
def situations(draw):
    queries = draw(st.integers(1, 6))
    keys = queries + draw(st.integers(0, 5))
    window = draw(st.none() | st.integers(1, 12))
    row = st.lists(st.booleans(), min_size=keys, max_size=keys)
    valid = draw(st.none() | st.lists(row, min_size=1, max_size=3))
    return queries, keys, window, None if valid is None else torch.tensor(valid)


@given(situations())
def test_mask_follows_the_rule(situation):
    queries, keys, window, valid = situation
    mask = causal_mask(valid, queries, keys, window=window, device=CPU)
    rows = [[True] * keys] if valid is None else valid.tolist()
    expected = torch.tensor(
        [[[_sees(q, window, row) for q in range(keys - queries, keys)]] for row in rows]
    )
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    assert torch.equal(mask.expand(expected.shape), expected)


def test_no_mask_is_made_where_plain_causal_is_meant():
    full = torch.ones(2, 5, dtype=torch.bool)
    assert causal_mask(full, 5, 5, window=5, device=CPU) is None
    assert causal_mask(full, 1, 5, device=CPU) is None
    assert causal_mask(None, 2, 5, device=CPU) is not None
    assert causal_mask(full, 5, 5, window=4, device=CPU) is not None


@pytest.mark.slow
@given(
    situations(),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.3]),
    st.integers(0, 2**16),
)
def test_attend_equals_its_plain_twin(situation, heads, scale, seed):
    queries, keys, window, valid = situation
    generator = torch.Generator().manual_seed(seed)
    batch = 2 if valid is None else len(valid)
    mask = causal_mask(valid, queries, keys, window=window, device=CPU)
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


def test_equal_heads_for_a_gpu_change_nothing(monkeypatch):
    monkeypatch.setattr(attention, "_wants_equal_heads", lambda _: True)
    q = torch.randn(2, 4, 3, 8)
    k, v = torch.randn(2, 2, 2, 6, 8)
    for mask in (causal_mask(None, 3, 6, device=CPU), torch.randn(2, 4, 3, 6)):
        torch.testing.assert_close(attend(q, k, v, mask=mask), attend_plain(q, k, v, mask=mask))


def test_gradients_equal_those_of_the_plain_twin():
    inputs = [torch.randn(1, h, 5, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    mask = causal_mask(torch.tensor([[False, False, True, True, True]]), 5, 5, device=CPU)
    found = torch.autograd.grad(attend(*inputs, mask=mask).square().sum(), inputs)
    expected = torch.autograd.grad(attend_plain(*inputs, mask=mask).square().sum(), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_capped_scores_in_pieces(monkeypatch, masked):
    """Whatever the path: one piece or many, a kernel or torch, with and without a mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    mask = causal_mask(None, 9, 12, window=4, device=q.device) if masked else None
    expected = attend_plain(q, k, v, mask=mask, softcap=1.5)
    assert not torch.allclose(expected, attend_plain(q, k, v, mask=mask), atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, mask=mask, softcap=1.5), expected)
        monkeypatch.setattr(attention, "SCORE_BYTES", 4 * 2 * 4 * 12 * 2)  # two queries a piece
        torch.testing.assert_close(attend(q, k, v, mask=mask, softcap=1.5), expected)
        last = attend(q[:, :, -1:], k, v, softcap=1.5)
    torch.testing.assert_close(last, attend_plain(q[:, :, -1:], k, v, softcap=1.5))


needs_attention_backward = pytest.mark.skipif(
    native() is None or not has_onednn(), reason="needs the library and oneDNN"
)


def draw(length, *, heads=4, kv_heads=2, width=32, rows=2, dtype=torch.float32):
    random = torch.Generator().manual_seed(length)
    sizes = (heads, kv_heads, kv_heads)
    drawn = [torch.randn(rows, length, n, width, generator=random).to(dtype) for n in sizes]
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


@needs_attention_backward
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "kv_heads"), [(5, 2), (64, 1), (130, 4)])
def test_output_and_gradients_are_those_of_the_formula(length, kv_heads, causal):
    given = draw(length, kv_heads=kv_heads)
    expected = prefill_reference(*given, scale=0.3, causal=causal)
    found = attention_backward(*given, scale=0.3, causal=causal)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, given, gradient),
        torch.autograd.grad(expected, given, gradient),
        atol=2e-5,
        rtol=1e-4,
    )


@needs_attention_backward
def test_bfloat16_is_computed_in_float32():
    given = draw(100, dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in given]
    gradient = torch.randn(2, 4, 100, 32).bfloat16()
    found = torch.autograd.grad(attention_backward(*given), given, gradient)
    expected = torch.autograd.grad(prefill_reference(*wide), wide, gradient.float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=2e-2)


@needs_attention_backward
def test_long_rows_that_learn_take_it():
    shape = {"heads": 4, "kv_heads": 1, "width": LEAST_SHARED // 4}
    long, short = draw(FEWEST, **shape), draw(FEWEST - 1, **shape)
    assert has_native_backward(*long)
    assert "_Attention" in attend(*long).grad_fn.name()
    assert not has_native_backward(*short)
    with torch.no_grad():
        assert not has_native_backward(*long)


@needs_attention_backward
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "is_taken"),
    [(9, 3, 64, True), (14, 2, 64, True), (8, 8, 32, False), (4, 4, 128, False), (8, 4, 64, False)],
)
def test_it_is_taken_where_enough_heads_share_their_keys(heads, kv_heads, width, is_taken):
    given = draw(FEWEST, heads=heads, kv_heads=kv_heads, width=width, rows=1)
    assert has_native_backward(*given) == is_taken
    assert ("_Attention" in attend(*given).grad_fn.name()) == is_taken


@needs_attention_backward
@pytest.mark.parametrize("has_products", [False, True])
def test_bfloat16_takes_it_where_the_cpu_has_no_such_products(monkeypatch, has_products):
    monkeypatch.setattr(attention, "has_bfloat16_products", lambda: has_products)
    given = draw(FEWEST, heads=3, kv_heads=1, width=64, rows=1, dtype=torch.bfloat16)
    assert has_native_backward(*given) != has_products
    expected = attend_plain(*(x.detach().float() for x in given))
    torch.testing.assert_close(attend(*given).float(), expected, atol=2e-2, rtol=2e-2)
