"""One prefix and many short sequences after it, in one pass: cascade attention.

    prefix     keys, values  [1, K, P, A] per layer, read once before
    flat row   [ a a | b b | c c c | d d d d ]     sequences of one length beside each other
    position   P, P + 1, ... in every one of them: each is where it would be alone

A sequence may go on where another one ends, its parent, so that several that begin alike have their
beginning once: its keys and values are gathered beside its own. A position sees the prefix, the
parents and what its own sequence has up to itself: the mask over the flat row is never made. Scores
with the prefix and with the own sequence go through one softmax, so what comes out is exactly the
attention of the sequence alone. Nothing is kept of the new positions. Knows lengths; must not know
what stands in the sequences.

Source: cascade inference of FlashInfer, and multi-item scoring of SGLang, which merge both parts by
their log-sum-exp; here they are normalised together, which is the same sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch

from lapilli.errors import GenerationError
from lapilli.kernels.attention import prefill_attention, prefills_natively
from lapilli.nn.attention import (
    SCORE_BYTES,
    attend,
    attend_plain,
    causal_bias,
    causal_mask,
    causal_ones,
)
from lapilli.shapes import Bool, Float, Int, Tensor

LONG = 64
"""Positions of a sequence from which one pass over prefix and sequence is faster than two products:
the kernel leaves out what is hidden, and copying the prefix costs little beside it."""
CACHED_BYTES = 2 << 20
"""Of the scores that are stored at once on a CPU, where they should stay in the cache: behind 3,000
positions two fifths less time than with SCORE_BYTES, which other devices take."""


class SharedPrefix:
    """The `cache` of a language model in a pass over sequences that share a prefix.

    Stands where a KVCache stands. It is not changed by a pass, so it may serve many.

    Args:
        prefix: keys and values of every layer, as `KVCache.stacked` returns them of one row.
        lengths: positions of the sequences, in the order of the flat row. Neighbours of one length
            and one place are computed together.
        parents: number of the sequence that each one goes on, wherever it lies; -1, or None for
            all: it begins behind the prefix.

    Raises:
        GenerationError: no sequences, one without positions, or parents that do not fit.
    """

    ragged = True
    """Several sequences in one row: the model makes no mask, attention knows who sees whom."""

    length = 0
    """Ragged rows have no one length, and `position_ids` tell positions."""

    def __init__(
        self,
        prefix: Float[Tensor, "2 L 1 K P A"],
        lengths: Sequence[int],
        parents: Sequence[int] | None = None,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise GenerationError(
                f"sequences after a prefix need at least one position each, got {list(lengths)}"
            )
        self._prefix = prefix
        self.lengths = list(lengths)
        """Positions of every sequence."""
        self._paths = _paths(self.lengths, parents)
        self._runs = self._runs_of(prefix.device)
        self._biases: dict[tuple[int, int, int | None], Tensor] = {}

    @property
    def prefix_length(self) -> int:
        """Return the positions of the prefix."""
        return self._prefix.shape[4]

    @property
    def position_ids(self) -> Int[Tensor, "1 T"]:
        """Return the position of everything in the flat row: that which it would have alone."""
        device, start = self._prefix.device, self.prefix_length
        steps = torch.arange(max(map(len, self._paths)), device=device) + start
        own = [
            steps[len(path) - length : len(path)]
            for path, length in zip(self._paths, self.lengths, strict=True)
        ]
        return torch.cat(own)[None]

    @property
    def last(self) -> Int[Tensor, " n"]:
        """Return where in the flat row every sequence ends."""
        lengths = torch.tensor(self.lengths, device=self._prefix.device)
        return lengths.cumsum(dim=0) - 1

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
        """Compute attention of every position over the prefix and its own sequence.

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

        Raises:
            GenerationError: another number of positions than the sequences have.
        """
        if q.shape[2] != sum(self.lengths):
            raise GenerationError(
                f"the sequences have {sum(self.lengths)} positions together, the pass {q.shape[2]}"
            )
        scale = q.shape[3] ** -0.5 if scale is None else scale
        before = self._prefix[0, layer], self._prefix[1, layer]
        parts = []
        for run in self._runs:
            rows = (  # [n, heads, t or s, A]
                _rows_of(q[0, :, run.new], run.count),
                _rows_of(k[0, :, run.seen], run.count),
                _rows_of(v[0, :, run.seen], run.count),
            )
            if run.length >= LONG:
                found = _attend_long(rows, before, scale, window, slopes, softcap)
            else:
                bias = self._bias(run.length, run.path, window, slopes, q)
                found = _attend_short(rows, before, scale, bias, softcap)
            parts.append(found.transpose(0, 1).flatten(1, 2))  # [Q, n t, A]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[None]

    def _runs_of(self, device: torch.device) -> list["_Run"]:
        """Return neighbours that are computed together."""
        runs, start, first = [], 0, 0
        shapes = [(n, len(path)) for n, path in zip(self.lengths, self._paths, strict=True)]
        for (length, path), same in groupby(shapes):
            count = len(list(same))
            new = slice(start, start + length * count)
            seen: slice | Int[Tensor, " i"] = new
            if path > length:
                some = self._paths[first : first + count]
                seen = torch.tensor([at for one in some for at in one], device=device)
            runs.append(_Run(length, path, count, new, seen))
            start, first = start + length * count, first + count
        return runs

    def _bias(
        self, length: int, path: int, window: int | None, slopes: Tensor | None, like: Tensor
    ) -> Float[Tensor, "1 Q t S"] | Bool[Tensor, "1 1 t _"]:
        """Return what is added to scores, or what is seen of the last ones; kept by window."""
        key = length, path, window
        if key not in self._biases:
            everything = self.prefix_length + path
            if slopes is None and (window is None or everything <= window):
                self._biases[key] = causal_ones(length, path, like.device)
            else:
                mask = causal_mask(None, length, everything, window=window, device=like.device)
                if slopes is not None:
                    mask = causal_bias(slopes, mask, length, everything, like.float())
                elif mask is None:  # one position, whose window hides nothing
                    mask = causal_ones(length, everything, like.device)
                self._biases[key] = mask
        return self._biases[key]


@dataclass(frozen=True, slots=True)
class _Run:
    """Sequences of one length that lie beside each other.

    Attributes:
        length: t, of each.
        path: s, of each with its parents.
        count: how many.
        new: where they lie in the flat row.
        seen: where what they see lies in it, parents first, s of each.
    """

    length: int
    path: int
    count: int
    new: slice
    seen: slice | Int[Tensor, " i"]


def _paths(lengths: Sequence[int], parents: Sequence[int] | None) -> list[list[int]]:
    """Return where in the flat row every sequence lies, its parents before it."""
    starts = list(accumulate(lengths, initial=0))
    own = [list(range(starts[i], starts[i + 1])) for i in range(len(lengths))]
    if parents is None:
        return own
    if len(parents) != len(lengths) or not all(-1 <= one < len(own) for one in parents):
        raise GenerationError(f"{len(lengths)} sequences have the parents {list(parents)}")
    paths = []
    for number in range(len(own)):
        chain = [number]
        while (parent := parents[chain[-1]]) >= 0:
            if len(chain) > len(own):
                raise GenerationError(f"sequence {number} is behind itself: {list(parents)}")
            chain.append(parent)
        paths.append([at for one in reversed(chain) for at in own[one]])
    return paths


def _rows_of(x: Float[Tensor, "heads T A"], count: int) -> Float[Tensor, "n heads t A"]:
    """Return each of `count` sequences of one length as a row."""
    return x.reshape(x.shape[0], count, -1, x.shape[2]).transpose(0, 1)


def _attend_long(
    rows: tuple[Tensor, ...],
    before: tuple[Tensor, Tensor],
    scale: float,
    window: int | None,
    slopes: Float[Tensor, " Q"] | None,
    softcap: float | None,
) -> Float[Tensor, "n Q t A"]:
    """Attend sequence by sequence, each over a copy of the prefix and itself."""
    found = []
    for q, k, v in zip(*(torch.split(x, 1) for x in rows), strict=True):
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        if softcap is None and prefills_natively(q, keys, values):
            found.append(
                prefill_attention(q, keys, values, scale=scale, window=window, slopes=slopes)
            )
            continue
        length, everything = q.shape[2], keys.shape[2]
        mask = causal_mask(None, length, everything, window=window, device=q.device)
        if slopes is not None:
            mask = causal_bias(slopes, mask, length, everything, q)
        found.append(attend(q, keys, values, mask=mask, scale=scale, softcap=softcap))
    return torch.cat(found)


def _attend_short(
    rows: tuple[Tensor, ...],
    before: tuple[Tensor, Tensor],
    scale: float,
    bias: Tensor,
    softcap: float | None,
) -> Float[Tensor, "n Q t A"]:
    """Attend in two products: all queries with the prefix, and with their own sequences.

    On a CPU computed in float32. The scores of a piece are bounded, or those of one sequence.
    """
    dtype, most = rows[0].dtype, SCORE_BYTES
    if rows[0].device.type == "cpu":
        most = CACHED_BYTES
        rows, before = tuple(x.float() for x in rows), (before[0].float(), before[1].float())
    _, heads, length, _ = rows[0].shape
    together = max(1, most // (4 * heads * length * (before[0].shape[2] + rows[1].shape[2])))
    found = [
        _attend_together(q, k, v, before, scale, bias, softcap)
        for q, k, v in zip(*(torch.split(x, together) for x in rows), strict=True)
    ]
    return (found[0] if len(found) == 1 else torch.cat(found)).to(dtype)


def _attend_together(
    q: Float[Tensor, "n Q t A"],
    k: Float[Tensor, "n K s A"],
    v: Float[Tensor, "n K s A"],
    before: tuple[Tensor, Tensor],
    scale: float,
    bias: Tensor,
    softcap: float | None,
) -> Float[Tensor, "n Q t A"]:
    count, heads, length, width = q.shape
    groups, past = k.shape[1], before[0].shape[2]
    everything = past + k.shape[2]
    rows = heads // groups * length
    prefix_k, prefix_v = before[0][0], before[1][0]  # [K, P, A]
    # [K, n, Q / K * t, A]: a group's queries of all sequences are one matrix for its prefix.
    grouped = (q * scale).transpose(0, 1).reshape(groups, -1, count, length, width)
    grouped = grouped.transpose(1, 2).reshape(groups, count, rows, width)
    own_k, own_v = k.transpose(0, 1), v.transpose(0, 1)  # [K, n, s, A]
    of_prefix = grouped.reshape(groups, -1, width) @ prefix_k.transpose(1, 2)
    of_own = grouped @ own_k.transpose(2, 3)
    scores = torch.cat([of_prefix.view(groups, count, rows, past), of_own], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _hide(scores.view(groups, count, -1, length, everything), bias)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    shares = shares.view(groups, count, rows, everything)
    of_prefix = shares[..., :past].reshape(groups, -1, past) @ prefix_v
    seen = of_prefix.view(grouped.shape) + shares[..., past:] @ own_v
    out = seen.view(groups, count, -1, length, width).transpose(1, 2)  # [K, Q / K, n, t, A]
    return out.reshape(heads, count, length, width).transpose(0, 1)


def _hide(scores: Float[Tensor, "K n G t S"], bias: Tensor) -> Float[Tensor, "K n G t S"]:
    """Return the scores with a bias of every head, or without what is hidden of the last ones."""
    if bias.dtype == torch.bool:
        scores[..., -bias.shape[-1] :].masked_fill_(~bias, float("-inf"))
        return scores
    return scores + bias.view(scores.shape[0], 1, -1, *bias.shape[2:])


def attend_reference(
    q: Float[Tensor, "1 Q T A"],
    k: Float[Tensor, "1 K T A"],
    v: Float[Tensor, "1 K T A"],
    prefix: tuple[Float[Tensor, "1 K P A"], Float[Tensor, "1 K P A"]],
    lengths: Sequence[int],
    parents: Sequence[int] | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes: Float[Tensor, " Q"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "1 Q T A"]:
    """Compute the same as `SharedPrefix.attend` under a mask over everything; the tests compare."""
    past, total = prefix[0].shape[2], sum(lengths)
    places, known = torch.empty(total, dtype=torch.long), torch.zeros(total, past + total).bool()
    known[:, :past] = True
    for path, length in zip(_paths(lengths, parents), lengths, strict=True):
        own = torch.tensor(path[-length:])
        places[own] = past + torch.arange(len(path) - length, len(path))
        known[own[:, None], past + torch.tensor(path)] = True
    where = torch.cat([torch.arange(past), places])
    distance = places[:, None] - where  # [T, P + T]
    seen = known & (distance >= 0)
    if window is not None:
        seen &= distance < window
    mask = seen[None, None]
    if slopes is not None:
        bias = -slopes.cpu()[:, None, None] * distance
        mask = bias.masked_fill(~seen, float("-inf")).to(q.dtype)[None]
    mask = mask.to(q.device)
    keys, values = (torch.cat(pair, dim=2) for pair in zip(prefix, (k, v), strict=True))
    return attend_plain(q, keys, values, mask=mask, scale=scale, softcap=softcap)
