"""Sizes of the block pool by options and by the memory of the machine."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from lapilli.generate.engine import EngineOptions
from lapilli.generate.engine import block_pool as planning
from lapilli.generate.engine.block_pool import new_pool, release_memory, total_memory
from lapilli.lm.decoder import Decoder
from lapilli.model import VisionLanguageModel
from lapilli.nn.paged import BlockStore, QuantizedBlockStore
from lapilli.quant import QuantConfig, quantize
from tests.generate.engine.conftest import CONFIG

CPU = torch.device("cpu")
PER_BLOCK = BlockStore.bytes_per_block(CONFIG, 32, torch.float32)


def pool(context_length: int = 128, *, model: VisionLanguageModel | None = None, **options: object):
    return new_pool(
        model or VisionLanguageModel(Decoder(CONFIG)),
        EngineOptions(**options),
        context_length=context_length,
        like=torch.zeros(1),
    )


@pytest.mark.parametrize(
    ("blocks_of_memory", "expected", "idle"),
    [
        (4 * 1000, 4 * 3, 500),  # enough: three rows of four blocks
        (4 * 6, 6, 3),  # a quarter of what there is
        (8, 4, 1),  # one whole context, whatever there is
    ],
)
def test_plan_by_the_memory_of_the_machine(monkeypatch, blocks_of_memory, expected, idle):
    monkeypatch.setattr(planning, "total_memory", lambda _: blocks_of_memory * PER_BLOCK)
    found = pool(max_rows=3)
    assert found.capacity == expected
    assert found.max_idle == idle


def test_byte_limits_of_the_options_are_followed():
    found = pool(kv_bytes=5 * PER_BLOCK)
    assert (found.capacity, found.max_idle) == (5, 6)
    found = pool(kv_bytes=5 * PER_BLOCK + 1, prefix_bytes=2 * PER_BLOCK)
    assert (found.capacity, found.max_idle) == (5, 2)


def test_int8_stores_more_positions_in_the_same_bytes():
    config = dataclasses.replace(CONFIG, head_dim=64)
    full = BlockStore.bytes_per_block(config, 32, torch.float32)
    small = QuantizedBlockStore.bytes_per_block(config, 32, torch.float32)
    assert 3.7 < full / small < 4
    assert isinstance(pool(kv_dtype="int8").store, QuantizedBlockStore)


@pytest.mark.parametrize(
    ("asked", "plain", "packed"),
    [
        ("auto", torch.float32, torch.bfloat16),
        ("model", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("int8", torch.int8, torch.int8),
    ],
)
def test_a_packed_model_keeps_bfloat16(asked, plain, packed):
    model = VisionLanguageModel(Decoder(CONFIG))
    assert pool(model=model, kv_dtype=asked).store.dtype == plain
    quantize(model, QuantConfig(bits=8))
    store = pool(model=model, kv_dtype=asked).store
    assert (store.dtype, store.float_dtype) == (packed, torch.float32)


def test_total_memory_of_this_machine():
    assert total_memory(CPU) > 1 << 28


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_memory_of_a_long_prompt_is_returned_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    release_memory()
    before = resident()
    held = [torch.ones(4096) for _ in range(6000)]  # 16 KiB each: too small for pages of their own
    kept = held[-1]
    assert resident() - before > 80 << 20
    del held
    release_memory()
    assert resident() - before < 20 << 20
    assert kept.sum() == 4096
