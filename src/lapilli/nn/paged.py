"""Paged keys and values: many sequences in blocks of P positions, and one ragged pass over them.

    per layer   keys, values  [N, K, P, A]
    a sequence  a table of blocks; position i lies in block table[i // P] at offset i % P

    flat row   [ a | b | c c | d d d d | e e e e e ]     sequences with few new tokens first
    a, b, c    read together over their block tables: decode, and guesses that are checked
    d, e       one after the other, over their own positions: prefill

Block 0 is never written: tables of unequal length are padded with it. Embeddings, norms and linear
layers see [1, T, D] without padding. Knows blocks and lengths; must not know requests.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from lapilli.config.model import TextConfig
from lapilli.kernels.attention import (
    WIDTH_STEP,
    decode_attention,
    prefill_attention,
    prefills_natively,
    store_positions,
)
from lapilli.kernels.layer import Places
from lapilli.kernels.library import native
from lapilli.nn.attention import attend, causal_bias, causal_mask
from lapilli.shapes import Bool, Float, Int, Tensor


class BlockStore:
    """Memory for keys and values.

    On a CPU the operating system hands out the memory page by page as blocks are written.

    Args:
        config: layers, heads and widths.
        num_blocks: blocks, block 0 included.
        block_size: positions of a block.
        dtype: of the model, in which keys and values come and go.
        kept_dtype: of the memory; None: the model's.
        device: of the memory.
    """

    always_kept: ClassVar[torch.dtype | None] = None
    """The dtype of the memory where none is asked for."""

    def __init__(
        self,
        config: TextConfig,
        num_blocks: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        kept_dtype: torch.dtype | None = None,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = kept_dtype or self.always_kept or dtype
        self.float_dtype = dtype
        self.device = device
        self._heads = config.num_kv_heads
        self._width = config.head_dim
        self._allocate(config.num_layers)

    def _allocate(self, layers: int) -> None:
        shape = (2 * layers, self.num_blocks, self._heads, self.block_size, self._width)
        memory = lazy_zeros(shape, self.dtype, self.device)
        self.keys, self.values = list(memory[:layers]), list(memory[layers:])
        # All layers in one tensor: what is done to a block is one operation. Each operation lets go
        # of the interpreter, and a server has other threads that take it.
        self._memory = [memory]

    @staticmethod
    def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the memory of one block in all layers; `dtype` is that of the memory."""
        positions = 2 * config.num_layers * config.num_kv_heads * block_size
        return positions * config.head_dim * dtype.itemsize

    def tensors(self) -> list[Tensor]:
        """Return all memory, every tensor with the blocks first: keys, values, their scales."""
        return [tensor for memory in self._memory for tensor in memory]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks."""
        for first, last in runs(blocks):
            for memory in self._memory:
                memory[:, first:last].zero_()

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks over others."""
        index = torch.tensor([sources, targets], device=self.device)
        for memory in self._memory:
            memory.index_copy_(1, index[1], memory.index_select(1, index[0]))

    def write(
        self,
        layer: int,
        blocks: Int[Tensor, " T"],
        offsets: Int[Tensor, " T"],
        k: Float[Tensor, "T K A"],
        v: Float[Tensor, "T K A"],
    ) -> None:
        """Write keys and values of T positions, each into its place."""
        store_positions(self.keys[layer], self.values[layer], blocks, offsets, k, v)

    @property
    def has_kernel(self) -> bool:
        """Return whether the compiled decode attention reads these blocks."""
        fits = self.float_dtype == torch.float32 and self._width % WIDTH_STEP == 0
        return fits and self.device.type == "cpu" and native() is not None

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "R Q A"],
        tables: Int[Tensor, "R n"],
        lengths: Int[Tensor, " R"],
        *,
        scale: float | None,
        window: int | None,
        slopes: Float[Tensor, " Q"] | None,
        softcap: float | None,
    ) -> Float[Tensor, "R Q A"]:
        """Attend with one query per row over the row's positions; where `has_kernel`."""
        return decode_attention(
            q,
            self.keys[layer],
            self.values[layer],
            tables,
            lengths,
            scale=scale,
            window=window,
            slopes=slopes,
            softcap=softcap,
            **self._scales(layer),
        )

    def _scales(self, layer: int) -> dict[str, Tensor]:
        return {}

    def rows_of(self, tables: Int[Tensor, "R n"]) -> Int[Tensor, " places"]:
        """Return what `gather` takes: the same for all layers, so it is computed once a step."""
        heads = torch.arange(self._heads, device=self.device)[None, :, None]
        return (tables[:, None] * self._heads + heads).flatten()

    def gather(
        self, layer: int, places: Int[Tensor, " places"], rows: int
    ) -> tuple[Float[Tensor, "R K S A"], Float[Tensor, "R K S A"]]:
        """Return copies of keys and values of R tables of n blocks, S = n * P."""
        return (
            self._gathered(self.keys[layer], places, rows).to(self.float_dtype),
            self._gathered(self.values[layer], places, rows).to(self.float_dtype),
        )

    def as_kept(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return new keys or values as they will come back.

        Who reads a prompt reads these: an answer does not depend on what was kept of it before.
        """
        return x.to(self.dtype).to(self.float_dtype)

    def _gathered(self, memory: Tensor, places: Tensor, rows: int) -> Tensor:
        found = memory.view(-1, self.block_size, self._width).index_select(0, places)
        return found.view(rows, self._heads, -1, self._width)


class QuantizedBlockStore(BlockStore):
    """The same in int8, with one float32 scale per position and head.

    A vector of A numbers is divided by its largest magnitude / 127 and rounded, so a number is off
    by at most 1/254 of the largest one in its vector.
    """

    always_kept = torch.int8

    def _allocate(self, layers: int) -> None:
        super()._allocate(layers)
        shape = (2 * layers, self.num_blocks, self._heads, self.block_size)
        scales = lazy_zeros(shape, torch.float32, self.device)
        self.key_scales, self.value_scales = list(scales[:layers]), list(scales[layers:])
        self._memory.append(scales)

    @staticmethod
    def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the memory of one block in all layers, scales included; `dtype` does not count."""
        positions = 2 * config.num_layers * config.num_kv_heads * block_size
        return positions * (config.head_dim + torch.float32.itemsize)

    def write(
        self,
        layer: int,
        blocks: Int[Tensor, " T"],
        offsets: Int[Tensor, " T"],
        k: Float[Tensor, "T K A"],
        v: Float[Tensor, "T K A"],
    ) -> None:
        """Write keys and values of T positions, rounded, each into its place."""
        for memory, scales, x in (
            (self.keys[layer], self.key_scales[layer], k),
            (self.values[layer], self.value_scales[layer], v),
        ):
            memory[blocks, :, offsets], scales[blocks, :, offsets] = _rounded(x)

    def gather(
        self, layer: int, places: Int[Tensor, " places"], rows: int
    ) -> tuple[Float[Tensor, "R K S A"], Float[Tensor, "R K S A"]]:
        """Return keys and values of R tables of n blocks, S = n * P, as floats again."""
        keys = self._gathered(self.keys[layer], places, rows)
        values = self._gathered(self.values[layer], places, rows)
        key_scales, value_scales = (
            scales.view(-1, self.block_size).index_select(0, places).view(*keys.shape[:3], 1)
            for scales in (self.key_scales[layer], self.value_scales[layer])
        )
        return (keys * key_scales).to(self.float_dtype), (values * value_scales).to(
            self.float_dtype
        )

    def as_kept(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return new keys or values as they will come back."""
        rounded, scale = _rounded(x)
        return (rounded * scale[..., None]).to(self.float_dtype)

    def _scales(self, layer: int) -> dict[str, Tensor]:
        return {"key_scales": self.key_scales[layer], "value_scales": self.value_scales[layer]}


def runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Return the blocks as ranges, each from its first block to behind its last one."""
    found: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return found


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors in int8, and the scale of each."""
    x = x.float()
    scale = x.abs().amax(dim=-1) / 127
    rounded = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    return rounded.to(torch.int8), scale


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that take memory page by page as they are written, where the device can.

    Zeros, not whatever was there: what attention masks out must still be finite. torch.zeros would
    write every page at once; numpy leaves it to the operating system.
    """
    # Whoever makes a store inside inference mode must still be able to change it outside.
    with torch.inference_mode(mode=False):
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(memory).view(dtype).view(shape)


MOST_TOGETHER = 8
"""New positions of one sequence up to which the compiled decode attention reads them."""


@dataclass(frozen=True, slots=True)
class PagedRow:
    """One sequence in this pass.

    Attributes:
        table: its blocks, enough for `past + count` positions.
        past: positions that the blocks hold already.
        count: new positions in this pass, at least 1.
    """

    table: Sequence[int]
    past: int
    count: int

    @property
    def length(self) -> int:
        """Return the number of positions after this pass."""
        return self.past + self.count


class PagedBatch:
    """The `cache` of a language model in one pass over ragged rows; stands where a KVCache stands.

    Args:
        store: where keys and values are.
        rows: in the order of the flat row, those with fewest new positions first.
        unchanged: whoever runs the model watches it and hands over the same object as long as
            nothing in it changes; None: nobody watches.
        whole_layers: whether a layer may be computed in one call; False: module by module.
    """

    ragged = True
    """Several sequences in one row: the model makes no mask, attention knows who sees whom."""

    length = 0
    """Ragged rows have no one length, and `position_ids` tell positions."""

    def __init__(
        self,
        store: BlockStore,
        rows: Sequence[PagedRow],
        *,
        unchanged: object | None = None,
        whole_layers: bool = True,
    ) -> None:
        if any(a.count > b.count for a, b in pairwise(rows)):
            raise ValueError("rows with fewer new positions come first")
        self.unchanged = unchanged
        self._store = store
        self._has_kernel = store.has_kernel
        short = MOST_TOGETHER if self._has_kernel else 1
        together = [row for row in rows if row.count <= short]
        self._longer = list(rows[len(together) :])
        # Every position that is read together is a row of its own, as long as what it sees.
        self._single_lengths = [at + 1 for row in together for at in range(row.past, row.length)]
        tables = self._tables([row for row in together for _ in range(row.count)])
        self._blocks, self._offsets = self._places(rows)
        self._tables_read = tables.int() if self._has_kernel else store.rows_of(tables)
        self._lengths = self._tensor(self._single_lengths).int()
        self.places: Places | None = None
        """Where new positions go, when all of them are read together from float blocks."""
        if whole_layers and self._has_kernel and not self._longer and type(store) is BlockStore:
            self.places = Places(self._blocks, self._offsets, self._tables_read, self._lengths)
        self._single_biases: dict[int | None, Tensor | None] = {}
        self._row_places = [
            store.rows_of(self._tables([row])) if row.past else None for row in self._longer
        ]

    def memory(self, layer: int) -> tuple[Float[Tensor, "N K P A"], Float[Tensor, "N K P A"]]:
        """Return keys and values of one layer."""
        return self._store.keys[layer], self._store.values[layer]

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "1 Q T A"],
        k: Float[Tensor, "1 K T A"],
        v: Float[Tensor, "1 K T A"],
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        slopes: Float[Tensor, " Q"] | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "1 Q T A"]:
        """Compute attention of every new position over its own sequence; keys and values are kept.

        Args:
            layer: whose keys and values these are.
            q: queries of the flat row.
            k: keys of the flat row.
            v: values of the flat row.
            mask: not read; a KVCache needs it.
            scale: factor on the scores, 1 / sqrt(A) when None.
            window: a query sees its own and the `window - 1` positions before it.
            slopes: per head, what every position of distance takes off the score (ALiBi).
            softcap: c, where a score s becomes c tanh(s / c).
        """
        self._store.write(
            layer, self._blocks, self._offsets, k[0].transpose(0, 1), v[0].transpose(0, 1)
        )
        parts = []
        start = len(self._single_lengths)
        if start:
            queries = q[:, :, :start]
            parts.append(self._attend_singles(layer, queries, scale, window, slopes, softcap))
        for row, places in zip(self._longer, self._row_places, strict=True):
            new = slice(start, start + row.count)
            if places is None:
                keys, values = (self._store.as_kept(x[:, :, new]) for x in (k, v))
            else:
                keys, values = self._store.gather(layer, places, 1)
                keys, values = keys[:, :, : row.length], values[:, :, : row.length]
            queries = q[:, :, new]
            if softcap is None and prefills_natively(queries, keys, values):
                seen = prefill_attention(
                    queries, keys, values, scale=scale, window=window, slopes=slopes
                )
            else:
                bias = causal_mask(None, row.count, row.length, window=window, device=q.device)
                if slopes is not None:
                    bias = causal_bias(slopes, bias, row.count, row.length, q)
                seen = attend(queries, keys, values, mask=bias, scale=scale, softcap=softcap)
            parts.append(seen)
            start += row.count
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_singles(
        self,
        layer: int,
        q: Float[Tensor, "1 Q R A"],
        scale: float | None,
        window: int | None,
        slopes: Float[Tensor, " Q"] | None,
        softcap: float | None,
    ) -> Float[Tensor, "1 Q R A"]:
        if self._has_kernel:
            found = self._store.attend(
                layer,
                q[0].transpose(0, 1),
                self._tables_read,
                self._lengths,
                scale=scale,
                window=window,
                slopes=slopes,
                softcap=softcap,
            )
            return found.transpose(0, 1).unsqueeze(0)
        rows = len(self._single_lengths)
        keys, values = self._store.gather(layer, self._tables_read, rows)
        if window not in self._single_biases:  # the same in all layers with this window
            bias = self._bias_of_singles(keys.shape[2], window, slopes, q)
            self._single_biases[window] = bias
        queries = q[0].transpose(0, 1).unsqueeze(2)  # [R, Q, 1, A]
        bias = self._single_biases[window]
        out = attend(queries, keys, values, mask=bias, scale=scale, softcap=softcap)
        return out[:, :, 0].transpose(0, 1).unsqueeze(0)

    def _bias_of_singles(
        self,
        num_keys: int,
        window: int | None,
        slopes: Float[Tensor, " Q"] | None,
        like: Tensor,
    ) -> Tensor | None:
        """Return what the one query of each row may see; None when all see everything."""
        lengths = self._single_lengths
        if window is not None and max(lengths) <= window:
            window = None
        if window is None and slopes is None and min(lengths) == num_keys:
            return None
        seen, bias = seen_from(self._lengths - 1, num_keys, window, slopes)
        return single_mask(seen, bias, like.dtype)

    def _places(self, rows: Sequence[PagedRow]) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
        size = self._store.block_size
        positions = [
            (row.table[at // size], at % size) for row in rows for at in range(row.past, row.length)
        ]
        blocks, offsets = zip(*positions, strict=True)
        return self._tensor(blocks), self._tensor(offsets)

    def _tables(self, rows: Sequence[PagedRow]) -> Int[Tensor, "R n"]:
        """Return the blocks of every row up to its length, padded with block 0."""
        size = self._store.block_size
        used = [-(-row.length // size) for row in rows]
        longest = max(used, default=0)
        tables = [[*row.table[:n], *[0] * (longest - n)] for row, n in zip(rows, used, strict=True)]
        return self._tensor(tables).view(len(rows), longest)

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._store.device)


def seen_from(
    positions: Int[Tensor, " R"],
    num_keys: int,
    window: int | None,
    slopes: Float[Tensor, " Q"] | None,
) -> tuple[Bool[Tensor, "R S"], Float[Tensor, "R Q S"] | None]:
    """Return what the one query of each row sees, at its position, and its bias by distance."""
    distance = positions[:, None] - torch.arange(num_keys, device=positions.device)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    return seen, None if slopes is None else -slopes[None, :, None] * distance[:, None]


def single_mask(
    seen: Bool[Tensor, "R S"], bias: Float[Tensor, "R Q S"] | None, dtype: torch.dtype
) -> Tensor:
    """Return both as the mask of `attend`, [R, 1 or Q, 1, S]."""
    if bias is None:
        return seen[:, None, None]
    return bias.to(dtype).masked_fill(~seen[:, None], float("-inf")).unsqueeze(2)
