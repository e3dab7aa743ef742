"""Paged attention of a ragged pass: many sequences in one row, each attending to its own.

    flat row   [ a | b | c c | d d d d | e e e e e ]     sequences with few new tokens first
    a, b, c    read together over their block tables: decode, and guesses that are checked
    d, e       one after the other, over their own positions: prefill

Embeddings, norms and linear layers see [1, T, D] without padding. Stands where a KVCache stands;
knows blocks and lengths, no requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from lapilli.kernels.layer import Places
from lapilli.kernels.prefill import prefill_attention, prefills_natively
from lapilli.nn.attention import attend, causal_mask
from lapilli.nn.block_store import BlockStore
from lapilli.shapes import Float, Int, Tensor

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
    """The view that a language model gets as its `cache` in one pass.

    Args:
        store: where keys and values are.
        rows: in the order of the flat row, those with fewest new positions first.
        unchanged: whoever runs the model watches it and hands over the same object as long as
            nothing in it changes; None: nobody watches.
        whole_layers: whether a layer may be computed in one call; False: module by module.
    """

    ragged = True
    """Several sequences in one row: the model makes no mask, attention knows who sees whom."""

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
        self._places_together: Places | None = None
        if whole_layers and self._has_kernel and not self._longer and type(store) is BlockStore:
            self._places_together = Places(
                self._blocks, self._offsets, self._tables_read, self._lengths
            )
        self._single_biases: dict[int | None, Tensor | None] = {}
        self._row_places = [
            store.rows_of(self._tables([row])) if row.past else None for row in self._longer
        ]

    @property
    def places(self) -> Places | None:
        """Return where new positions go, when all of them are read together from float blocks."""
        return self._places_together

    def memory(self, layer: int) -> tuple[Float[Tensor, "N K P A"], Float[Tensor, "N K P A"]]:
        """Return keys and values of one layer."""
        return self._store.keys[layer], self._store.values[layer]

    @property
    def length(self) -> int:
        """Return 0: ragged rows have no one length, and `position_ids` tell positions."""
        return 0

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
                bias = _row_bias(row, window, slopes, q)
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
        distance = (self._lengths[:, None] - 1) - torch.arange(num_keys, device=like.device)
        seen = distance >= 0  # [R, S]
        if window is not None:
            seen &= distance < window
        if slopes is None:
            return seen[:, None, None]
        bias = -slopes[None, :, None] * distance[:, None]  # [R, Q, S]
        return bias.to(like.dtype).masked_fill(~seen[:, None], float("-inf")).unsqueeze(2)

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


def _row_bias(
    row: PagedRow, window: int | None, slopes: Float[Tensor, " Q"] | None, like: Tensor
) -> Tensor | None:
    """Return who sees whom among the new positions of one sequence."""
    if slopes is None:
        return causal_mask(None, row.count, row.length, window=window, device=like.device)
    keys = torch.arange(row.length, device=like.device)
    distance = keys[row.past :, None] - keys  # [T, S]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    bias = -slopes[:, None, None] * distance
    return bias.to(like.dtype).masked_fill(hidden, float("-inf")).unsqueeze(0)
