"""The cache gives back what was appended, whatever happened in between."""

import dataclasses

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lapilli.config.model import MptConfig
from lapilli.errors import GenerationError
from lapilli.nn.kv_cache import KVCache

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
