"""Block pool: paged memory for keys and values, with a prefix cache of blocks that are free.

    position key   of a position: its token id, or a medium's digest and the place in it
    chain          root -> digest of block 0 -> digest of block 0, 1 -> ...    (SHA-256)
    block          fresh -> owned by sequences -> idle, found again by its digest -> evicted

A full block is shared by all sequences that begin alike. Where two sequences part inside a block,
the later one continues in a copy of it (copy on write). Knows keys, no requests. The memory of an
engine is planned here too.
"""

import ctypes
import hashlib
import os
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any

import torch

from lapilli.config.generation import MIB, EngineOptions
from lapilli.errors import GenerationError
from lapilli.model import VisionLanguageModel
from lapilli.nn.paged import BlockStore, QuantizedBlockStore
from lapilli.quant.linear import QuantLinear
from lapilli.shapes import Tensor


@dataclass(slots=True)
class PrefixStats:
    """Counts since the pool was made.

    Attributes:
        tokens: of all prompts that were looked up.
        cached_tokens: of those, tokens whose keys and values were found.
        evictions: idle blocks whose content was discarded.
    """

    tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class Prefix:
    """The cached beginning of a sequence.

    Attributes:
        chain: the root, then one digest per full block.
        blocks: the full blocks.
        tail: a block whose first positions continue the sequence, and how many do.
    """

    chain: tuple[bytes, ...]
    blocks: tuple[int, ...] = ()
    tail: tuple[int, int] | None = None

    def length(self, block_size: int) -> int:
        """Return the number of cached positions."""
        return len(self.blocks) * block_size + (0 if self.tail is None else self.tail[1])


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence.

    Attributes:
        blocks: position i is in blocks[i // P].
        chain: the root, then the digests of the first blocks, as far as they are published.
        length: positions that were cached at the beginning.
        num_ready: first blocks in which nothing of another sequence is left.
        source: a block that the last of them is still to be copied from, which the table owns too.
    """

    blocks: list[int]
    chain: list[bytes]
    length: int
    num_ready: int
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Label:
    """Content of a published block: found by `digest`, next to others with the same `parent`."""

    digest: bytes
    parent: bytes
    keys: tuple[int, ...]


@dataclass(slots=True)
class _Block:
    owners: int = 0
    label: Label | None = None
    is_used: bool = False


class BlockPool:
    """Blocks of a store: fresh, owned, or idle and found by the digest of their content.

    Args:
        store: the memory; its block 0 is never given away.
        max_idle: most idle blocks that are cached; 0: nothing outlives its sequence.
    """

    def __init__(self, store: BlockStore, *, max_idle: int | None = None) -> None:
        self.store = store
        self.block_size = store.block_size
        self.max_idle = store.num_blocks if max_idle is None else max_idle
        self.stats = PrefixStats()
        self._blocks = [_Block() for _ in range(store.num_blocks)]
        self._fresh = list(range(store.num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._known: dict[bytes, int] = {}
        self._children: dict[bytes, dict[int, tuple[int, ...]]] = {}

    @property
    def capacity(self) -> int:
        """Blocks that sequences may own."""
        return self.store.num_blocks - 1

    @property
    def available(self) -> int:
        """Number of blocks without an owner."""
        return len(self._fresh) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Number of cached blocks without an owner."""
        return len(self._idle)

    def blocks_for(self, positions: int) -> int:
        """Return how many blocks hold so many positions."""
        return -(-positions // self.block_size)

    def chain(self, root: bytes, keys: Sequence[int]) -> tuple[bytes, ...]:
        """Return the digests by which the beginning of a sequence is found.

        The last position is always computed, because its logits are not cached.
        """
        chain, size = [root], self.block_size
        for start in range(0, len(keys) - size, size):
            chain.append(chain_digest(chain[-1], keys[start : start + size]))
        return tuple(chain)

    def find(self, chain: Sequence[bytes], keys: Sequence[int]) -> Prefix:
        """Return the longest cached beginning of a sequence; `chain` is that of its keys."""
        known = takewhile(lambda block: block is not None, map(self._known.get, chain[1:]))
        blocks = tuple(block for block in known if block is not None)
        start = len(blocks) * self.block_size
        tail = self._tail(chain[len(blocks)], keys[start : len(keys) - 1])
        return Prefix(tuple(chain[: len(blocks) + 1]), blocks, tail)

    def _tail(self, parent: bytes, keys: Sequence[int]) -> tuple[int, int] | None:
        """Return the block after `parent` that shares the longest beginning, and its length."""
        held = self._children.get(parent, {})
        length, block = max(((_shared(held[n], keys), n) for n in held), default=(0, 0))
        return (block, length) if length else None

    def reserve(self, prefix: Prefix, num_positions: int) -> BlockTable | None:
        """Return blocks for a sequence, its cached beginning shared; None: too few are free."""
        borrowed = [*prefix.blocks, *([] if prefix.tail is None else [prefix.tail[0]])]
        for block in borrowed:
            self._own(block)
        needed = self.blocks_for(num_positions) - len(prefix.blocks)
        if needed > self.available:
            for block in reversed(borrowed):
                self._disown(block)
            # The block to copy may be the one that is missing.
            return self.reserve(replace(prefix, tail=None), num_positions) if prefix.tail else None
        fresh = [self._take() for _ in range(needed)]
        return BlockTable(
            [*prefix.blocks, *fresh],
            list(prefix.chain),
            prefix.length(self.block_size),
            num_ready=len(borrowed),
            source=None if prefix.tail is None else prefix.tail[0],
        )

    def make_ready(self, reached: Iterable[tuple[BlockTable, int]]) -> None:
        """Fill the blocks that sequences of these lengths reach with what must stand there first.

        A beginning that is shared in part is copied, and blocks that others used before are zeroed:
        nothing of theirs may leak, not even NaN. This is done for all sequences of a step at once
        and for what they reach alone: most answers end long before the longest one that blocks are
        reserved for.
        """
        listed = [(table, self.blocks_for(length)) for table, length in reached]
        self._copy([table for table, _ in listed if table.source is not None])
        blocks = [one for table, end in listed for one in table.blocks[table.num_ready : end]]
        self.store.clear([block for block in blocks if self._blocks[block].is_used])
        for block in blocks:
            self._blocks[block].is_used = True
        for table, end in listed:  # last: an interrupted clearing is repeated
            table.num_ready = max(table.num_ready, end)

    def _copy(self, tables: Sequence[BlockTable]) -> None:
        """Copy what tables share in part into blocks of their own."""
        pairs = [
            (table.source, table.blocks[table.num_ready - 1])
            for table in tables
            if table.source is not None
        ]
        if not pairs:
            return
        self.store.copy(*zip(*pairs, strict=True))
        for table, (source, target) in zip(tables, pairs, strict=True):
            self._blocks[target].is_used = True
            table.source = None
            self._disown(source)

    def publish(self, table: BlockTable, keys: Sequence[int], length: int) -> None:
        """Label the blocks that `length` computed positions fill, so that others find them."""
        while len(table.chain) * self.block_size <= length:
            table.chain.append(self._publish_next(table, keys, length))

    def release(self, table: BlockTable, keys: Sequence[int], length: int) -> None:
        """Free the blocks of a sequence; the first `length` positions stay cached."""
        if table.source is not None:
            self._copy([table])
        self.publish(table, keys, length)
        if (len(table.chain) - 1) * self.block_size < length:
            self._publish_next(table, keys, length)
        # The last block is evicted first: a beginning without its end is still of use.
        for block in reversed(table.blocks):
            self._disown(block)
        table.blocks = []

    def _publish_next(self, table: BlockTable, keys: Sequence[int], length: int) -> bytes:
        """Label the first block that is not published, as far as it is computed."""
        at, parent = len(table.chain) - 1, table.chain[-1]
        end = min(length, (at + 1) * self.block_size)
        held = tuple(keys[at * self.block_size : end])
        digest = chain_digest(parent, held)
        self._label(table.blocks[at], Label(digest, parent, held))
        return digest

    def clear(self) -> None:
        """Discard the content of all idle blocks."""
        while self._idle:
            self._fresh.append(self._evict())

    def recount(self, tables: Iterable[BlockTable]) -> None:
        """Count owners again after an interrupted change; `tables` are those of all owners.

        Labels are right at any moment: a block gets its label after its content is complete and
        loses it before it is given to another sequence.
        """
        owners: Counter[int] = Counter()
        for table in tables:
            owners.update(table.blocks if table.source is None else [*table.blocks, table.source])
        self._known, self._children = {}, {}
        free = []
        for number in [*self._idle, *(set(range(1, len(self._blocks))) - self._idle.keys())]:
            block = self._blocks[number]
            block.owners = owners[number]
            label, block.label = block.label, None
            if label is not None:
                self._label(number, label)
            if not block.owners:
                free.append(number)
        self._idle = OrderedDict.fromkeys(n for n in free if self._blocks[n].label is not None)
        self._fresh = sorted((n for n in free if self._blocks[n].label is None), reverse=True)
        while len(self._idle) > self.max_idle:
            self._fresh.append(self._evict())

    def _label(self, block: int, label: Label) -> None:
        # Another block with the same content may have been computed at the same time and stays.
        if label.digest not in self._known:
            self._blocks[block].label = label
            self._known[label.digest] = block
            self._children.setdefault(label.parent, {})[block] = label.keys

    def _own(self, block: int) -> None:
        self._blocks[block].owners += 1
        self._idle.pop(block, None)

    def _disown(self, block: int) -> None:
        state = self._blocks[block]
        state.owners -= 1
        if state.owners:
            return
        if state.label is None:
            self._fresh.append(block)
            return
        self._idle[block] = None
        if len(self._idle) > self.max_idle:
            self._fresh.append(self._evict())

    def _take(self) -> int:
        block = self._fresh.pop() if self._fresh else self._evict()
        self._blocks[block].owners = 1
        return block

    def _evict(self) -> int:
        """Return the least recently used idle block; its content is discarded."""
        block, _ = self._idle.popitem(last=False)
        label = self._blocks[block].label
        if label is not None:
            del self._known[label.digest]
            siblings = self._children[label.parent]
            del siblings[block]
            if not siblings:
                del self._children[label.parent]
        self._blocks[block].label = None
        self.stats.evictions += 1
        return block


def chain_digest(parent: bytes, keys: Sequence[int]) -> bytes:
    """Return the digest of everything up to the end of a block."""
    return hashlib.sha256(parent + ",".join(f"{key:x}" for key in keys).encode()).digest()


def media_keys(digest: bytes, length: int) -> list[int]:
    """Return the position keys of a medium, below zero so that none is a token id."""
    number = int.from_bytes(digest, "big")
    return [-1 - (number << 32 | i) for i in range(length)]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def new_pool(
    model: VisionLanguageModel, options: EngineOptions, *, context_length: int, like: Tensor
) -> BlockPool:
    """Return the block pool of an engine, sized by its options or by the memory of the machine.

    Args:
        model: the model.
        options: `kv_bytes`, `prefix_bytes`, `block_size` and `kv_dtype` count.
        context_length: tokens of the longest conversation.
        like: a tensor of the dtype and on the device of the hidden states.

    Raises:
        GenerationError: `kv_bytes` does not hold two blocks.
    """
    config, device = model.language_model.config, like.device
    dtype = kept_dtype(model, options, like)
    kind = QuantizedBlockStore if dtype == torch.int8 else BlockStore
    size = options.block_size
    per_block = kind.bytes_per_block(config, size, dtype)
    budget, idle_bytes = options.kv_bytes, options.prefix_bytes
    if budget is None:
        one = -(-context_length // size) * per_block
        memory = total_memory(device)
        budget = max(one, min(options.max_rows * one, memory // 4))
        idle_bytes = memory // 8 if idle_bytes is None else idle_bytes
    num_blocks = budget // per_block
    if num_blocks < 1:
        raise GenerationError(
            f"kv_bytes {budget} is less than one block of {size} positions takes in this model "
            f"({per_block}): give it at least {per_block / MIB:.1f} MiB per {size} positions"
        )
    idle = None if idle_bytes is None else idle_bytes // per_block
    store = kind(
        config,
        num_blocks + 1,
        block_size=size,
        dtype=like.dtype,
        kept_dtype=dtype,
        device=device,
    )
    return BlockPool(store, max_idle=idle)


def kept_dtype(model: VisionLanguageModel, options: EngineOptions, like: Tensor) -> torch.dtype:
    """Return the dtype in which keys and values are kept.

    Beside weights rounded to 8 or 4 bits the error of bfloat16 keys and values does not show, and a
    token of a 7B model reads a third of a gigabyte less.
    """
    if options.kv_dtype == "int8":
        return torch.int8
    is_packed = any(isinstance(one, QuantLinear) for one in model.modules())
    rounds = options.kv_dtype == "auto" and is_packed and like.device.type == "cpu"
    return torch.bfloat16 if rounds or options.kv_dtype == "bfloat16" else like.dtype


def total_memory(device: torch.device) -> int:
    """Return the bytes of the GPU, or of the machine; 8 GiB where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 8192 * MIB


def release_memory() -> None:
    """Return freed memory to the system (malloc_trim), after a picture or a long prompt.

    glibc keeps it otherwise, up to a fifth of a gigabyte after a prompt of a 7B model.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:  # noqa: ANN401  a foreign function
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
