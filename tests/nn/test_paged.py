"""A pass over ragged rows in blocks equals one pass per sequence with a cache of its own."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.config.model import DecoderConfig, MptConfig
from lapilli.lm import LanguageModel
from lapilli.lm.decoder import Decoder
from lapilli.lm.mpt import Mpt
from lapilli.nn.paged import BlockStore, PagedBatch, PagedRow, QuantizedBlockStore, runs

BLOCK = 4
NUM_BLOCKS = 48


class PlainStore(BlockStore):
    """As where nothing was compiled."""

    has_kernel = False


class PlainQuantizedStore(QuantizedBlockStore):
    has_kernel = False


class KeptBfloat16(BlockStore):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, kept_dtype=torch.bfloat16, **options)


def decoder(window: int | None, kv_heads: int) -> Decoder:
    config = DecoderConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=64,
        sliding_window=window,
    )
    return Decoder(config)


def mpt() -> Mpt:
    config = MptConfig(vocab_size=31, hidden_size=64, num_layers=2, num_heads=4, max_positions=64)
    return Mpt(config)


MODELS = {
    "grouped": lambda: decoder(None, 2),
    "one head each": lambda: decoder(None, 4),
    "window": lambda: decoder(5, 2),
    "alibi": mpt,
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request) -> LanguageModel:
    torch.manual_seed(3)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def store_for(model: LanguageModel, kind: type[BlockStore] = BlockStore) -> BlockStore:
    store = kind(
        model.config,
        NUM_BLOCKS,
        block_size=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for tensor in store.tensors():  # what others left there must not matter
        tensor[1:] = 7
    return store


@st.composite
def passes(draw):
    """New positions of every sequence in each of some passes, at most 30 in all."""
    sequences = draw(st.integers(1, 4))
    return draw(
        st.lists(
            st.lists(st.integers(0, 10), min_size=sequences, max_size=sequences).filter(any),
            min_size=1,
            max_size=3,
        )
    )


def tables_for(counts: list[list[int]]) -> list[list[int]]:
    """Scattered blocks, enough for every sequence."""
    free = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1)) + 1
    blocks = iter(free.tolist())
    need = [-(-sum(column) // BLOCK) for column in zip(*counts, strict=True)]
    return [[next(blocks) for _ in range(n)] for n in need]


@torch.inference_mode()
def run_paged(model, store, tables, counts, embeds) -> list[torch.Tensor]:
    past = [0] * len(tables)
    out: list[list[torch.Tensor]] = [[] for _ in tables]
    for step in counts:
        order = sorted((i for i, n in enumerate(step) if n), key=lambda i: step[i])
        rows = [PagedRow(tables[i], past[i], step[i]) for i in order]
        flat = torch.cat([embeds[i][past[i] : past[i] + step[i]] for i in order])[None]
        positions = torch.cat([torch.arange(past[i], past[i] + step[i]) for i in order])[None]
        hidden = model.forward(flat, position_ids=positions, cache=PagedBatch(store, rows))
        parts = hidden[0].split([step[i] for i in order])
        for i, part in zip(order, parts, strict=True):
            out[i].append(part)
            past[i] += step[i]
    return [torch.cat(parts) for parts in out if parts]


@torch.inference_mode()
def run_alone(model, embeds) -> torch.Tensor:
    positions = torch.arange(len(embeds))[None]
    return model.forward(embeds[None], position_ids=positions, cache=model.new_cache(1))[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BlockStore, PlainStore])
@given(passes())
@settings(max_examples=25, deadline=None)
def test_ragged_rows_equal_solo_runs(model, kind, counts):
    torch.manual_seed(0)
    lengths = [sum(column) for column in zip(*counts, strict=True)]
    embeds = [torch.randn(n, model.config.hidden_size) for n in lengths]
    found = run_paged(model, store_for(model, kind), tables_for(counts), counts, embeds)
    expected = [run_alone(model, row) for row in embeds if len(row)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [QuantizedBlockStore, PlainQuantizedStore])
@given(passes())
@settings(max_examples=10, deadline=None)
def test_int8_blocks_stay_near(model, kind, counts):
    torch.manual_seed(0)
    lengths = [sum(column) for column in zip(*counts, strict=True)]
    embeds = [torch.randn(n, model.config.hidden_size) for n in lengths]
    store = store_for(model, kind)
    found = run_paged(model, store, tables_for(counts), counts, embeds)
    expected = [run_alone(model, row) for row in embeds if len(row)]
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KeptBfloat16, QuantizedBlockStore, PlainQuantizedStore])
@given(st.integers(1, 20), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_what_is_read_does_not_depend_on_how(kind, first, second):
    """All at once or in two passes: rounding comes before reading in both."""
    model = decoder(None, 2)
    generator = torch.Generator().manual_seed(first)
    q = torch.randn(1, 4, first + second, 16, generator=generator)
    k, v = (torch.randn(1, 2, first + second, 16, generator=generator) for _ in range(2))
    table = tables_for([[first + second]])[0]
    found = []
    for split in ([first + second], [first, second]):
        store, past, parts = store_for(model, kind), 0, []
        for count in filter(None, split):
            new = slice(past, past + count)
            batch = PagedBatch(store, [PagedRow(table, past, count)])
            parts.append(batch.attend(0, q[:, :, new], k[:, :, new], v[:, :, new]))
            past += count
        found.append(torch.cat(parts, dim=2))
    torch.testing.assert_close(*found, atol=2e-6, rtol=2e-6)


def test_int8_numbers_are_off_by_half_a_step():
    model = decoder(None, 2)
    store = store_for(model, QuantizedBlockStore)
    k, v = torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    v[2] = 0  # no magnitude to divide by
    blocks, offsets = torch.tensor([3, 3, 3, 3, 9]), torch.tensor([0, 1, 2, 3, 0])
    store.write(1, blocks, offsets, k, v)
    places = store.rows_of(torch.tensor([[3, 9]]))
    for written, read in zip((k, v), store.gather(1, places, 1), strict=True):
        back = read[0, :, :5].transpose(0, 1)
        step = written.abs().amax(dim=-1, keepdim=True) / 127
        assert ((back - written).abs() <= step / 2 + 1e-6).all()


def test_bytes_per_block_are_those_of_the_tensors():
    config = decoder(None, 2).config
    for kind in (BlockStore, QuantizedBlockStore):
        store = kind(config, 3, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu"))
        held = sum(tensor.nbytes for tensor in store.tensors())
        assert held == 3 * kind.bytes_per_block(config, BLOCK, torch.float32)


def test_memory_is_taken_as_blocks_are_written():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    before = resident()
    store = BlockStore(
        decoder(None, 2).config,
        20_000,
        block_size=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert sum(tensor.nbytes for tensor in store.tensors()) > 300 << 20
    assert resident() - before < 50 << 20


def test_cleared_blocks_hold_no_nan():
    model = decoder(None, 2)
    store = store_for(model)
    for tensor in store.tensors():
        tensor[5] = float("nan")
    store.clear([5])
    assert all(bool(tensor.isfinite().all()) for tensor in store.tensors())
    assert all(bool((tensor[4] == 7).all()) for tensor in store.tensors())


def test_copied_blocks_are_equal():
    store = store_for(decoder(None, 2))
    for tensor in store.tensors():
        tensor[2:4] = torch.randn(tensor[2:4].shape)
    store.copy((2, 3, 2), (6, 5, 7))
    for tensor in store.tensors():
        assert torch.equal(tensor[[2, 3, 2]], tensor[[6, 5, 7]])


@given(st.sets(st.integers(1, 20)))
def test_ranges_hold_the_blocks_and_no_others(blocks):
    found = runs(blocks)
    assert sorted(blocks) == [one for first, last in found for one in range(first, last)]
    assert all(a[1] < b[0] for a, b in pairwise(found))


def test_rows_with_fewer_new_positions_come_first():
    store = store_for(decoder(None, 2))
    with pytest.raises(ValueError, match="fewer new positions come first"):
        PagedBatch(store, [PagedRow([1], 0, 2), PagedRow([2], 0, 1)])
