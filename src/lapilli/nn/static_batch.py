"""A decode pass of fixed shapes, one new position per row, that a device can record.

    tables   [R, n]   blocks of every row, padded with block 0
    lengths  [R]      positions of every row, the new one included; 0: no row, only padding

Nothing here depends on the values of these two: no list, no branch, no copy from the device. Rows
of padding write zeros into block 0, so that it stays zero, and their results mean nothing. Stands
where a KVCache stands; several new positions of one sequence are rows with the same table.
"""

import torch

from lapilli.nn.attention import attend
from lapilli.nn.block_store import BlockStore
from lapilli.shapes import Bool, Float, Int, Tensor


class StaticBatch:
    """The view that a language model gets as its `cache` in one such pass.

    Args:
        store: where keys and values are.
        tables: see the head of this file.
        lengths: likewise.
        has_kernel: `store.has_kernel`; asked before, because a compiler cannot look for libraries.
    """

    ragged = True
    """Several sequences in one row: the model makes no mask, attention knows who sees whom."""

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

    @property
    def length(self) -> int:
        """Return 0: ragged rows have no one length, and `position_ids` tell positions."""
        return 0

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
            seen = self._seen(window)
            if torch.compiler.is_compiling():
                bias = None if slopes is None else self._bias(slopes)
                found = attend_fused(
                    rows, keys, values, seen, bias=bias, scale=scale, softcap=softcap
                )
            else:
                seen = seen[:, None, None]
                if slopes is not None:
                    bias = self._bias(slopes).to(q.dtype)[:, :, None]
                    seen = bias.masked_fill(~seen, float("-inf"))
                queries = rows.unsqueeze(2)
                found = attend(queries, keys, values, mask=seen, scale=scale, softcap=softcap)
                found = found.squeeze(2)
        return found.transpose(0, 1).unsqueeze(0)

    def _distance(self) -> Int[Tensor, "R S"]:
        """Return the distance of every position to the new one; below zero: nothing is there."""
        keys = torch.arange(self._num_keys, device=self.positions.device)
        return self.positions[:, None] - keys

    def _seen(self, window: int | None) -> Bool[Tensor, "R S"]:
        distance = self._distance()
        seen = distance >= 0
        return seen if window is None else seen & (distance < window)

    def _bias(self, slopes: Float[Tensor, " Q"]) -> Float[Tensor, "R Q S"]:
        return -slopes[None, :, None] * self._distance()[:, None]


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
