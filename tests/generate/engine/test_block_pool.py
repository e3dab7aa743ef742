"""The block pool gives no block to two owners and finds only what was published."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lapilli.config.model import DecoderConfig
from lapilli.generate.engine.block_pool import BlockPool, chain_digest, media_keys
from lapilli.nn.paged import BlockStore

SIZE = 4
CONFIG = DecoderConfig(
    vocab_size=9,
    hidden_size=4,
    intermediate_size=4,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)
ROOT = b"root"


def new_pool(blocks: int = 9, max_idle: int | None = None) -> BlockPool:
    store = BlockStore(
        CONFIG, blocks, block_size=SIZE, dtype=torch.float32, device=torch.device("cpu")
    )
    return BlockPool(store, max_idle=max_idle)


def begin(pool, keys, answer=0, root=ROOT):
    """Reserve, and write every key where its keys and values would go."""
    prefix = pool.find(pool.chain(root, keys), keys)
    table = pool.reserve(prefix, len(keys) + answer)
    if table is not None:
        pool.make_ready([(table, len(keys))])
        write(pool, table, keys, table.length)
    return table


def write(pool, table, keys, start=0):
    for at in range(start, len(keys)):
        pool.store.keys[0][table.blocks[at // SIZE], 0, at % SIZE, 0] = keys[at]


def held(pool, table, length):
    return [
        int(pool.store.keys[0][table.blocks[at // SIZE], 0, at % SIZE, 0]) for at in range(length)
    ]


class Pool(RuleBasedStateMachine):
    """Sequences of few different keys begin, grow and end; keys stand for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.running: list = []
        self.admitted: list = []

    @rule(keys=st.lists(st.integers(0, 1), min_size=1, max_size=14), answer=st.integers(0, 6))
    def start(self, keys, answer):
        table = begin(self.pool, keys, answer)
        if table is not None:
            self.pool.publish(table, keys, len(keys))
            self.running.append((table, list(keys), answer))

    @rule(keys=st.lists(st.integers(0, 1), min_size=1, max_size=14), answer=st.integers(0, 6))
    def admit(self, keys, answer):
        """Reserve blocks for a sequence whose first step comes later."""
        prefix = self.pool.find(self.pool.chain(ROOT, keys), keys)
        table = self.pool.reserve(prefix, len(keys) + answer)
        if table is not None:
            self.admitted.append((table, list(keys), answer))

    @precondition(lambda self: self.admitted)
    @rule()
    def first_step(self):
        self.pool.make_ready([(table, len(keys)) for table, keys, _ in self.admitted])
        for table, keys, _ in self.admitted:
            write(self.pool, table, keys, table.length)
            self.pool.publish(table, keys, len(keys))
        self.running += self.admitted
        self.admitted = []

    @precondition(lambda self: self.admitted)
    @rule(at=st.integers(0, 9))
    def cancel(self, at):
        """End a sequence before its first step: what it shares stays cached."""
        table, keys, _ = self.admitted.pop(at % len(self.admitted))
        self.pool.release(table, keys, table.length)

    @rule()
    def interrupt(self):
        self.pool.recount([table for table, _, _ in [*self.running, *self.admitted]])

    @precondition(lambda self: self.running)
    @rule(at=st.integers(0, 9), key=st.integers(0, 1))
    def grow(self, at, key):
        table, keys, left = self.running[at % len(self.running)]
        if left:
            keys.append(key)
            self.pool.make_ready([(table, len(keys))])
            write(self.pool, table, keys, len(keys) - 1)
            self.pool.publish(table, keys, len(keys))
            self.running[at % len(self.running)] = (table, keys, left - 1)

    @precondition(lambda self: self.running)
    @rule(at=st.integers(0, 9))
    def end(self, at):
        table, keys, _ = self.running.pop(at % len(self.running))
        self.pool.release(table, keys, len(keys))

    @rule()
    def forget(self):
        self.pool.clear()

    @invariant()
    def every_sequence_still_holds_its_keys(self):
        for table, keys, _ in self.running:
            assert held(self.pool, table, len(keys)) == keys

    @invariant()
    def no_block_is_lost(self):
        tables = [table for table, _, _ in [*self.running, *self.admitted]]
        owned = {block for table in tables for block in table.blocks}
        owned |= {table.source for table in tables if table.source is not None}
        assert self.pool.available + len(owned) == self.pool.capacity
        assert 0 not in owned


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_second_sequence_shares_full_blocks_and_copies_the_half_one():
    pool = new_pool()
    first, second = list(range(1, 11)), [*range(1, 10), 77, 78]
    table = begin(pool, first)
    pool.release(table, first, len(first))
    again = begin(pool, second)
    assert again.blocks[:2] == sorted(again.blocks[:2], key=again.blocks.index)
    assert again.length == 9
    assert held(pool, again, 11) == second
    third = begin(pool, first)  # the half block of the first is as it was
    assert third.length == 9
    assert held(pool, third, 10) == first
    assert third.blocks[:2] == again.blocks[:2]
    assert third.blocks[2] != again.blocks[2]


def test_the_last_position_is_always_computed():
    pool = new_pool()
    keys = list(range(8))
    pool.release(begin(pool, keys), keys, 8)
    assert begin(pool, keys).length == 7
    assert begin(pool, [5]).length == 0


def test_another_weights_version_finds_nothing():
    pool = new_pool()
    keys = list(range(8))
    pool.release(begin(pool, keys), keys, 8)
    assert begin(pool, keys, root=b"other").length == 0


def test_only_computed_positions_are_published():
    pool = new_pool()
    keys = list(range(8))
    table = begin(pool, keys)
    pool.release(table, keys, 3)  # cancelled in the middle of its prompt
    assert begin(pool, keys).length == 3


def test_the_last_block_of_the_oldest_sequence_is_evicted_first():
    pool = new_pool(blocks=5)
    a, b = [1] * 8, [2] * 8
    pool.release(begin(pool, a), a, 8)
    pool.release(begin(pool, b), b, 8)
    c = begin(pool, [3, 3, 3, 3])
    assert c is not None
    assert pool.stats.evictions == 1
    assert pool.find(pool.chain(ROOT, a), a).length(SIZE) == 4  # its beginning survived
    assert pool.find(pool.chain(ROOT, b), b).length(SIZE) == 7


def test_block_to_copy_may_be_the_one_that_is_needed():
    pool = new_pool(blocks=3)
    keys = [1, 2, 3, 4, 5, 6, 7, 8]
    pool.release(begin(pool, keys), keys, 8)
    table = begin(pool, [1, 2, 9, 9, 9, 9, 9])
    assert table is not None
    assert table.length == 0


@pytest.mark.parametrize(("max_idle", "kept"), [(0, 0), (1, 4), (None, 9)])
def test_idle_blocks_are_limited(max_idle, kept):
    pool = new_pool(max_idle=max_idle)
    keys = list(range(10))
    pool.release(begin(pool, keys), keys, 10)
    assert pool.num_idle == (3 if max_idle is None else max_idle)
    assert begin(pool, keys).length == kept


def test_used_blocks_are_cleared_when_they_are_reached():
    pool = new_pool(max_idle=0)
    table = begin(pool, [5] * 8)
    pool.store.values[0][table.blocks] = float("nan")
    pool.release(table, [5] * 8, 8)
    again = begin(pool, [6], answer=7)
    first, second = again.blocks
    assert pool.store.values[0][first].eq(0).all()
    pool.make_ready([(again, SIZE + 1)])
    assert pool.store.values[0][second].eq(0).all()
    pool.store.values[0][first] = 1  # of the sequence's own: nothing is cleared twice
    pool.make_ready([(again, SIZE + 2)])
    assert pool.store.values[0][first].eq(1).all()


def test_media_keys_are_no_token_ids():
    keys = media_keys(b"\0" * 32, 3)
    assert max(keys) < 0
    assert len({*keys, *media_keys(b"\1" * 32, 3)}) == 6


def test_different_keys_have_different_digests():
    assert chain_digest(ROOT, [1, 23]) != chain_digest(ROOT, [12, 3])
    assert chain_digest(ROOT, [-1]) != chain_digest(ROOT, [1])
