"""Caches that a language model reads besides blocks: contiguous, of fixed shapes, and of training.

    KVCache       per layer [B, K, capacity, A]; the first `length` positions are filled, append
                  writes in place; full -> a buffer twice as long
    StaticBatch   a decode pass over blocks, one new position per row, that a device can record
    Segments      packed sequences of a training pass, which keep nothing

`Cache` names what may stand there; a pass over ragged rows is in nn/paged.py, one over many short
sequences after a prefix in nn/shared_prefix.py. Knows positions; must not know requests.
"""

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from lapilli.config.model import TextConfig
from lapilli.errors import GenerationError
from lapilli.nn.attention import attend, causal_bias, causal_mask
from lapilli.nn.linear import rounded
from lapilli.nn.paged import BlockStore, PagedBatch, seen_from, single_mask
from lapilli.nn.shared_prefix import SharedPrefix
from lapilli.shapes import Bool, Float, Int, Tensor


class KVCache:
    """Keys and values per layer, preallocated.

    Meant for generation: appended tensors are written into a buffer, so run under
    `torch.no_grad()` or `torch.inference_mode()`.
    """

    ragged = False
    """All rows have the same number of positions; the caller's mask says which are padding."""

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        capacity: int = 256,
    ) -> None:
        self._shape = (batch, config.num_kv_heads, config.head_dim)
        self._lengths = [0] * config.num_layers
        self._keys = [self._empty(capacity, dtype, device) for _ in self._lengths]
        self._values = [self._empty(capacity, dtype, device) for _ in self._lengths]

    def _empty(self, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        batch, heads, width = self._shape
        return torch.empty(batch, heads, capacity, width, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Return the number of positions that every layer holds."""
        return self._lengths[-1]

    @property
    def batch(self) -> int:
        """Return the number of sequences."""
        return self._shape[0]

    @property
    def device(self) -> torch.device:
        """Return where the positions are."""
        return self._keys[0].device

    def stacked(self) -> Float[Tensor, "2 L B K S A"]:
        """Return a copy of the keys and of the values of every layer so far."""
        held = [
            torch.stack(
                [buffer[:, :, :filled] for buffer, filled in zip(kind, self._lengths, strict=True)]
            )
            for kind in (self._keys, self._values)
        ]
        return torch.stack(held)

    @property
    def capacity(self) -> int:
        """Return the positions that fit before the next growth."""
        return self._keys[0].shape[2]

    def append(
        self, layer: int, k: Float[Tensor, "B K T A"], v: Float[Tensor, "B K T A"]
    ) -> tuple[Float[Tensor, "B K S A"], Float[Tensor, "B K S A"]]:
        """Append to a layer and return all of it, the new ones last: views until the next append.

        Raises:
            GenerationError: another number of rows than the cache was made for.
        """
        if k.shape[0] != self.batch:
            raise GenerationError(
                f"the KV cache holds {self.batch} rows but {k.shape[0]} rows were appended: "
                "reorder() it or make a new one"
            )
        start = self._lengths[layer]
        end = start + k.shape[2]
        if end > self._keys[layer].shape[2]:
            self._grow(layer, end)
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        self._lengths[layer] = end
        return keys[:, :, :end], values[:, :, :end]

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "B Q T A"],
        k: Float[Tensor, "B K T A"],
        v: Float[Tensor, "B K T A"],
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        slopes: Tensor | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "B Q T A"]:
        """Append new keys and values, then `attention.attend` over all of the layer's."""
        keys, values = self.append(layer, k, v)
        return attend(q, keys, values, mask=mask, scale=scale, softcap=softcap)

    def _grow(self, layer: int, needed: int) -> None:
        """Return a buffer at least twice as long, so that n appends copy O(n) positions in all."""
        for buffers in (self._keys, self._values):
            old, filled = buffers[layer], self._lengths[layer]
            new = self._empty(max(needed, 2 * old.shape[2]), old.dtype, old.device)
            new[:, :, :filled] = old[:, :, :filled]
            buffers[layer] = new

    def reorder(self, rows: Sequence[int] | Int[Tensor, " rows"]) -> None:
        """Make row i what row rows[i] was; fewer or more rows than before are allowed."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self._keys[0].device)
        if index.tolist() == list(range(self.batch)):
            return
        self._shape = (len(index), *self._shape[1:])
        for layer, filled in enumerate(self._lengths):
            for buffers in (self._keys, self._values):
                old = buffers[layer]
                new = self._empty(old.shape[2], old.dtype, old.device)
                new[:, :, :filled] = old[:, :, :filled].index_select(0, index)
                buffers[layer] = new

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            GenerationError: the cache is shorter than that.
        """
        if not 0 <= length <= self.length:
            raise GenerationError(
                f"a KV cache of {self.length} positions cannot be truncated to {length}"
            )
        self._lengths = [length] * len(self._lengths)


class StaticBatch:
    """A decode pass of fixed shapes, one new position per row.

    Nothing here depends on the values of tables and lengths: no list, no branch, no copy from the
    device. Rows of padding write zeros into block 0, so that it stays zero, and their results mean
    nothing. Several new positions of one sequence are rows with the same table.

    Args:
        store: where keys and values are.
        tables: blocks of every row, padded with block 0.
        lengths: positions of every row, the new one included; 0: no row, only padding.
        has_kernel: `store.has_kernel`; asked before, because a compiler cannot look for libraries.
    """

    ragged = True
    """Several sequences in one row: the model makes no mask, attention knows who sees whom."""

    length = 0
    """Ragged rows have no one length, and `position_ids` tell positions."""

    def __init__(
        self,
        store: BlockStore,
        tables: Int[Tensor, "R n"],
        lengths: Int[Tensor, " R"],
        *,
        has_kernel: bool,
    ) -> None:
        self._store = store
        self._has_kernel = has_kernel
        self._is_padding = lengths == 0
        last = (lengths - 1).clamp(min=0)
        self.positions = last.long()
        """Positions of the new tokens."""
        self._lengths = last + 1
        size = store.block_size
        self._blocks = tables.gather(1, self.positions[:, None] // size)[:, 0].long()
        self._offsets = self.positions % size
        self._tables = tables if has_kernel else store.rows_of(tables.long())
        self._num_keys = tables.shape[1] * size

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "1 Q R A"],
        k: Float[Tensor, "1 K R A"],
        v: Float[Tensor, "1 K R A"],
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        slopes: Float[Tensor, " Q"] | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "1 Q R A"]:
        """Attend from every new position to its own sequence, see PagedBatch.attend."""
        store, rows = self._store, q[0].transpose(0, 1)
        new = [x[0].transpose(0, 1).masked_fill(self._is_padding[:, None, None], 0) for x in (k, v)]
        store.write(layer, self._blocks, self._offsets, *new)
        if self._has_kernel:
            found = store.attend(
                layer,
                rows,
                self._tables,
                self._lengths,
                scale=scale,
                window=window,
                slopes=slopes,
                softcap=softcap,
            )
        else:
            keys, values = store.gather(layer, self._tables, rows.shape[0])
            seen, bias = seen_from(self.positions, self._num_keys, window, slopes)
            if torch.compiler.is_compiling():
                found = attend_fused(
                    rows, keys, values, seen, bias=bias, scale=scale, softcap=softcap
                )
            else:
                mask = single_mask(seen, bias, q.dtype)
                queries = rows.unsqueeze(2)
                found = attend(queries, keys, values, mask=mask, scale=scale, softcap=softcap)
                found = found.squeeze(2)
        return found.transpose(0, 1).unsqueeze(0)


def attend_fused(
    q: Float[Tensor, "R Q A"],
    k: Float[Tensor, "R K S A"],
    v: Float[Tensor, "R K S A"],
    seen: Bool[Tensor, "R S"],
    *,
    bias: Float[Tensor, "R Q S"] | None,
    scale: float | None,
    softcap: float | None = None,
) -> Float[Tensor, "R Q A"]:
    """Attend by products and sums, for a compiler that fuses them with whatever makes k and v.

    Keys and values that are gathered from blocks are then read where they lie. A matrix product
    would have them copied first, which costs three times the traffic. Computed in float32.

    Args:
        q: one query per row.
        k: keys, Q a multiple of K.
        v: values.
        seen: what each row sees; at least one position each.
        bias: added to the scores.
        scale: factor on the scores, 1 / sqrt(A) when None.
        softcap: c, where a score s becomes c tanh(s / c).
    """
    rows, heads, width = q.shape
    grouped = q.float().view(rows, k.shape[1], -1, 1, width)
    scores = (grouped * k.float()[:, :, None]).sum(dim=-1)  # [R, K, Q / K, S]
    scores = scores * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.view(scores.shape)
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1)
    out = (weights[..., None] * v.float()[:, :, None]).sum(dim=-2)
    return out.view(rows, heads, width).to(q.dtype)


class Segments:
    """Packed sequences of a training pass: several in one row, none seeing another.

        row   [ 0 1 2 3 | 0 1 2 | 0 1 2 3 4 | padding ]      attention inside each piece alone

    What a block-diagonal mask would hide is never computed. No layer tells its number, which
    compiled layers would be translated for one by one.

    Args:
        lengths: per row the lengths of its sequences from its first position on; what follows them
            is padding.
    """

    ragged = True
    """Positions are told by `position_ids`, and no mask is needed."""

    length = 0
    """Positions that were read before: none."""

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self._lengths = lengths

    def attend(
        self,
        q: Float[Tensor, "B Q T A"],
        k: Float[Tensor, "B K T A"],
        v: Float[Tensor, "B K T A"],
        *,
        scale: float | None = None,
        window: int | None = None,
        slopes: Float[Tensor, " Q"] | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "B Q T A"]:
        """Attend causally inside every sequence, see PagedBatch.attend; zeros under padding."""
        rows = []
        for row, lengths in enumerate(self._lengths):
            padding = q.shape[2] - sum(lengths)
            pieces = [torch.split(x[row : row + 1], [*lengths, padding], dim=2) for x in (q, k, v)]
            seen = [
                _attend_one(piece, window, slopes, scale, softcap)
                for piece in list(zip(*pieces, strict=True))[:-1]
            ]
            rows.append(torch.cat([*seen, torch.zeros_like(pieces[0][-1])], dim=2))
        return rows[0] if len(rows) == 1 else torch.cat(rows)


@functools.cache
def uncompiled_segments() -> type[Segments]:
    """Return Segments for compiled layers: no part of a program, as lengths differ in every batch.

    Made when asked for, as torch takes a second to import what it is made with.
    """
    left_out = torch.compiler.disable(Segments.attend)  # type: ignore[no-untyped-call]  # torch's own
    return type("UncompiledSegments", (Segments,), {"attend": left_out})


def _attend_one(
    piece: tuple[Tensor, ...],
    window: int | None,
    slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Attend inside one sequence, `rounded`: padding on its right is seen by nobody."""
    length = piece[0].shape[2]
    q, k, v = (functional.pad(x, (0, 0, 0, rounded(length) - length)) for x in piece)
    mask = causal_mask(None, q.shape[2], q.shape[2], window=window, device=q.device)
    if slopes is not None:
        mask = causal_bias(slopes, mask, q.shape[2], q.shape[2], q)
    return attend(q, k, v, mask=mask, scale=scale, softcap=softcap)[:, :, :length]


Cache = KVCache | PagedBatch | StaticBatch | Segments | SharedPrefix
"""The `cache` of a language model: rows of one length, or ragged rows over blocks."""
