"""Packed sequences of a training pass: several in one row, none seeing another.

    row   [ 0 1 2 3 | 0 1 2 | 0 1 2 3 4 | padding ]      attention inside each piece alone

Stands where a KVCache stands and keeps nothing: what a block-diagonal mask would hide is never
computed. No layer tells its number, which compiled layers would be translated for one by one.
"""

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from lapilli.nn.attention import attend, causal_mask
from lapilli.nn.onednn import rounded
from lapilli.shapes import Float, Tensor


class Segments:
    """Rows cut into sequences.

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
        """Compute causal attention inside every sequence; zeros where there is padding.

        Args:
            q: queries of all rows.
            k: their keys.
            v: their values.
            scale: factor on the scores, 1 / sqrt(A) when None.
            window: a query sees its own and the `window - 1` positions before it.
            slopes: per head, what every position of distance takes off the score (ALiBi).
            softcap: c, where a score s becomes c tanh(s / c).
        """
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
    bias = _bias(q, window, slopes)
    return attend(q, k, v, mask=bias, scale=scale, softcap=softcap)[:, :, :length]


def _bias(q: Tensor, window: int | None, slopes: Tensor | None) -> Tensor | None:
    """Return who sees whom in one sequence; None where that is plain causal."""
    length = q.shape[2]
    mask = causal_mask(None, length, length, window=window, device=q.device)
    if slopes is None:
        return mask
    at = torch.arange(length, device=q.device)
    distance = at[:, None] - at  # [T, T]
    seen = distance >= 0 if mask is None else mask[0, 0]
    bias = -slopes[:, None, None] * distance
    return bias.to(q.dtype).masked_fill(~seen, float("-inf"))[None]
