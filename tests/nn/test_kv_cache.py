"""What was appended comes back; fixed shapes equal ragged rows; no sequence sees another."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lapilli.config.model import MptConfig
from lapilli.errors import GenerationError
from lapilli.nn.attention import attend_plain
from lapilli.nn.kv_cache import KVCache, Segments, StaticBatch, attend_fused
from lapilli.nn.paged import BlockStore, PagedBatch, PagedRow, QuantizedBlockStore
from tests.nn.test_paged import (
    BLOCK,
    MODELS,
    PlainQuantizedStore,
    PlainStore,
    run_paged,
    store_for,
    tables_for,
)

CONFIG = MptConfig(vocab_size=5, hidden_size=6, num_layers=2, num_heads=2, max_positions=9)
CPU = torch.device("cpu")


def _cache(batch: int, capacity: int) -> KVCache:
    return KVCache(CONFIG, batch, torch.float32, CPU, capacity=capacity)


class CacheMachine(RuleBasedStateMachine):
    """Against a plain list of tensors that are concatenated."""

    def __init__(self):
        super().__init__()
        self.cache = _cache(2, 1)
        self.plain = [[torch.empty(2, 2, 0, 3) for _ in "kv"] for _ in range(2)]

    @rule(length=st.integers(1, 5))
    def append(self, length):
        for layer in range(2):
            new = torch.randn(2, self.cache.batch, 2, length, 3)
            found = self.cache.append(layer, new[0], new[1])
            for i in range(2):
                self.plain[layer][i] = torch.cat((self.plain[layer][i], new[i]), dim=2)
                assert torch.equal(found[i], self.plain[layer][i])

    @rule(data=st.data())
    def reorder(self, data):
        rows = data.draw(st.lists(st.integers(0, self.cache.batch - 1), min_size=1, max_size=4))
        self.cache.reorder(rows)
        self.plain = [[tensor[rows] for tensor in layer] for layer in self.plain]

    @precondition(lambda self: self.cache.length)
    @rule(data=st.data())
    def truncate(self, data):
        length = data.draw(st.integers(0, self.cache.length))
        self.cache.truncate(length)
        self.plain = [[tensor[:, :, :length] for tensor in layer] for layer in self.plain]

    @invariant()
    def sizes(self):
        assert self.cache.length == self.plain[0][0].shape[2] <= self.cache.capacity
        assert self.cache.batch == self.plain[0][0].shape[0]


TestCache = CacheMachine.TestCase
TestCache.settings = settings(stateful_step_count=12, max_examples=40, deadline=None)


def test_one_step_within_the_capacity_copies_nothing_old():
    cache = _cache(1, 4)
    first, _ = cache.append(0, *torch.randn(2, 1, 2, 2, 3))
    place = first.data_ptr()
    second, _ = cache.append(0, *torch.randn(2, 1, 2, 1, 3))
    assert second.data_ptr() == place


def test_growth_doubles():
    cache = _cache(1, 4)
    sizes = []
    for _ in range(40):
        for layer in range(2):
            cache.append(layer, *torch.randn(2, 1, 2, 1, 3))
        sizes.append(cache.capacity)
    assert sorted(set(sizes)) == [4, 8, 16, 32, 64]


def test_length_counts_finished_layers():
    cache = _cache(1, 4)
    cache.append(0, *torch.randn(2, 1, 2, 2, 3))
    assert cache.length == 0
    cache.append(1, *torch.randn(2, 1, 2, 2, 3))
    assert cache.length == 2


def test_refuses_another_number_of_rows():
    with pytest.raises(GenerationError, match="holds 2 rows but 3 rows were appended"):
        _cache(2, 4).append(0, *torch.randn(2, 3, 2, 1, 3))


def test_refuses_to_truncate_to_more_than_there_is():
    with pytest.raises(GenerationError, match="0 positions cannot be truncated to 1"):
        _cache(1, 4).truncate(1)


def test_dtype_and_shape_come_from_the_arguments():
    wide = dataclasses.replace(CONFIG, num_layers=1, hidden_size=10)
    cache = KVCache(wide, 3, torch.bfloat16, CPU, capacity=2)
    keys, _ = cache.append(0, *torch.randn(2, 3, 2, 1, 5))
    assert keys.dtype == torch.bfloat16
    assert keys.shape == (3, 2, 1, 5)


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


LENGTHS = st.lists(
    st.lists(st.integers(1, 9) | st.integers(31, 39), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def masked(q, k, v, lengths, *, scale, window, slopes):
    """Everything at once: scores of all pairs, those of other pieces and of later ones hidden."""
    rows, heads, total, _ = q.shape
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    at = torch.arange(total)
    distance = at[:, None] - at
    out = torch.zeros_like(q)
    for row in range(rows):
        piece = torch.full((total,), -1)
        for number, length in enumerate(lengths[row]):
            start = sum(lengths[row][:number])
            piece[start : start + length] = number
        seen = (piece[:, None] == piece) & (piece >= 0)[:, None] & (distance >= 0)
        if window is not None:
            seen &= distance < window
        scores = q[row] @ k[row].transpose(-1, -2) * scale
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        shares = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).nan_to_num()
        out[row] = shares @ v[row]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_slopes", [False, True])
@given(LENGTHS, st.integers(0, 3))
def test_no_piece_sees_another(window, has_slopes, lengths, padding):
    total = max(map(sum, lengths)) + padding
    random = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(len(lengths), n, total, 8, generator=random) for n in (4, 2, 2))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05]) if has_slopes else None
    how = {"scale": 0.3, "window": window, "slopes": slopes}
    expected = masked(q, k, v, lengths, **how)
    torch.testing.assert_close(Segments(lengths).attend(q, k, v, **how), expected)


def test_all_layers_stacked_are_what_was_appended():
    cache = _cache(2, 8)
    given = torch.randn(2, 2, 2, 2, 3, 3)  # keys and values, layers, rows, heads, positions
    for layer in range(2):
        cache.append(layer, *given[:, layer])
    stacked = cache.stacked()
    assert torch.equal(stacked, given)
    cache.truncate(0)
    cache.append(0, *torch.zeros(2, 2, 2, 3, 3))
    assert torch.equal(stacked, given)  # a copy
