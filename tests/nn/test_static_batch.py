"""A pass in fixed shapes equals the pass over ragged rows that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.nn.attention import attend_plain
from lapilli.nn.block_store import BlockStore, QuantizedBlockStore
from lapilli.nn.paged import PagedBatch, PagedRow
from lapilli.nn.static_batch import StaticBatch, attend_fused
from tests.nn.test_paged import (
    BLOCK,
    MODELS,
    PlainQuantizedStore,
    PlainStore,
    run_paged,
    store_for,
    tables_for,
)

KINDS = (BlockStore, PlainStore, QuantizedBlockStore, PlainQuantizedStore)
MOST = 6  # new positions of a row


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    torch.manual_seed(3)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def fixed(rows, tables, *, count, width) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables and lengths of rows (sequence, length), padded."""
    lengths = torch.zeros(count, dtype=torch.int32)
    padded = torch.zeros(count, width, dtype=torch.int32)
    for i, (sequence, length) in enumerate(rows):
        lengths[i] = length
        used = tables[sequence][: -(-length // BLOCK)]
        padded[i, : len(used)] = torch.tensor(used)
    return padded, lengths


@torch.inference_mode()
def both_ways(model, kind, past, counts) -> tuple[list[torch.Tensor], list[BlockStore]]:
    """Hidden states of `counts` new positions per sequence, ragged and in fixed shapes."""
    total = [[p + n for p, n in zip(past, counts, strict=True)]]
    tables = tables_for(total)
    torch.manual_seed(0)
    embeds = [torch.randn(n, model.config.hidden_size) for n in total[0]]
    order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i])
    rows = [(i, past[i] + at + 1) for i in order for at in range(counts[i])]
    flat = torch.stack([embeds[i][length - 1] for i, length in rows])
    found, stores = [], []
    for is_static in (False, True):
        store = store_for(model, kind)
        if any(past):
            run_paged(model, store, tables, [past], embeds)
        if is_static:
            padded, lengths = fixed(rows, tables, count=len(rows) + 3, width=len(tables[0]) + 20)
            cache = StaticBatch(store, padded, lengths, has_kernel=store.has_kernel)
            filled = torch.cat((flat, torch.randn(3, flat.shape[1])))
            positions = cache.positions[None]
        else:
            paged = [PagedRow(tables[i], past[i], counts[i]) for i in order]
            cache = PagedBatch(store, paged)
            filled, positions = flat, torch.tensor([[length - 1 for _, length in rows]])
        hidden = model.forward(filled[None], position_ids=positions, cache=cache)[0]
        found.append(hidden[: len(rows)])
        stores.append(store)
    return found, stores


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, MOST)), min_size=1, max_size=4).filter(
        lambda drawn: any(new for _, new in drawn)
    )
)
@settings(max_examples=10)
def test_fixed_shapes_equal_ragged_rows(model, kind, drawn):
    past, counts = [list(column) for column in zip(*drawn, strict=True)]
    (ragged, static), stores = both_ways(model, kind, past, counts)
    # A number next to the middle of two steps may be rounded to either.
    is_rounded = issubclass(kind, QuantizedBlockStore)
    near = {"atol": 0.05, "rtol": 0.05} if is_rounded else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(static, ragged, **near)
    for ours, theirs in zip(*(store.tensors() for store in stores), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1 if is_rounded else 1e-5, rtol=1e-4)


def test_padding_leaves_block_0_at_zero(model):
    _, stores = both_ways(model, BlockStore, [3, 0], [1, 2])
    assert not any(bool(tensor[0].any()) for tensor in stores[1].tensors())


def test_padding_is_hidden_even_where_a_row_is_not_finite():
    model = MODELS["grouped"]().eval()
    store = store_for(model, PlainStore)
    tables, lengths = fixed([(0, 2)], [[5]], count=2, width=3)
    cache = StaticBatch(store, tables, lengths, has_kernel=False)
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
    k[:, :, 1] = float("nan")
    cache.attend(0, q, k, k)
    again = cache.attend(0, q, k, k)
    assert bool(again[:, :, 0].isfinite().all())


@given(
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.none() | st.just(0.3),
    st.booleans(),
)
@settings(max_examples=25)
def test_products_and_sums_are_attention(heads, lengths, scale, biased):
    queries, groups = heads
    rows, positions = len(lengths), 9
    torch.manual_seed(0)
    q = torch.randn(rows, queries, 8)
    k, v = torch.randn(2, rows, groups, positions, 8).unbind()
    seen = torch.arange(positions) < torch.tensor(lengths)[:, None]
    bias = torch.randn(rows, queries, positions) if biased else None
    mask = torch.zeros(rows, queries, positions) if bias is None else bias
    mask = mask.masked_fill(~seen[:, None], float("-inf"))[:, :, None]
    expected = attend_plain(q[:, :, None], k, v, mask=mask, scale=scale)[:, :, 0]
    found = attend_fused(q, k, v, seen, bias=bias, scale=scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
