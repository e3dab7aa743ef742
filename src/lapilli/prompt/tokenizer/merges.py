"""The merges of a BPE vocabulary that lists only its pieces: every cut of a piece into two.

    piece "abc" -> "a" "bc", "ab" "c", whichever halves are pieces too

Every beginning and every end of every piece has to be looked up, a third of a million in a
vocabulary of 32,000, of which one in five is a piece. So they are first told apart by sums over
their characters, all at once; only what may be a piece is cut out and looked up by its text.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

_SLOT_BITS = 20
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes
_MIX = np.uint64(0xBF58476D1CE4E5B9)

Indices = NDArray[np.int64]
Numbers = NDArray[np.uint64]


def merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which they are merged: best score first, then first halves by id.

    Args:
        scores: of the pieces that merges may make.
        ids: of the pieces that may be merged.
    """
    pieces = sorted(scores, key=scores.__getitem__, reverse=True)
    owners, places = _likely_cuts(pieces, ids.keys())
    cuts: list[tuple[str, str]] = []
    cut_owners: list[int] = []
    first_ids: list[int] = []
    for owner, at in zip(owners.tolist(), places.tolist(), strict=True):
        piece = pieces[owner]
        first, second = piece[:at], piece[at:]
        first_id = ids.get(first)
        if first_id is not None and second in ids:
            cuts.append((first, second))
            cut_owners.append(owner)
            first_ids.append(first_id)
    order = np.lexsort((np.array(first_ids), np.array(cut_owners)))
    return [cuts[i] for i in order.tolist()]


def _likely_cuts(pieces: Sequence[str], known: AbstractSet[str]) -> tuple[Indices, Indices]:
    """Numbers of pieces and places in them: all where both halves are known, and a few others."""
    texts = [*pieces, *(known - set(pieces))]
    is_known = np.fromiter((text in known for text in texts), dtype=np.bool_, count=len(texts))
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    sums, powers = _sums("".join(texts))
    is_taken = np.zeros(1 << _SLOT_BITS, dtype=np.bool_)
    is_taken[_slots((sums[ends] - sums[starts])[is_known], powers[starts][is_known])] = True

    lengths, starts, ends = (each[: len(pieces)] for each in (lengths, starts, ends))
    before = np.repeat(sums[starts], lengths)
    begins = is_taken[_slots(sums[: len(before)] - before, np.repeat(powers[starts], lengths))]
    begins[starts[lengths > 0]] = False  # nothing before the place
    places = np.flatnonzero(begins)
    owners = np.searchsorted(ends, places, side="right")
    is_cut = is_taken[_slots(sums[ends[owners]] - sums[places], powers[places])]
    places, owners = places[is_cut], owners[is_cut]
    return owners, places - starts[owners]


def _sums(text: str) -> tuple[Numbers, Numbers]:
    """At every place of a text the sum of its characters so far, each times a power of its own.

    Also the power that makes differences of two sums the same wherever a part of the text stands.
    All arithmetic is modulo 2 ** 64.

    Source: Karp and Rabin 1987, fingerprints of the parts of a text.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    powers = np.full(len(codes) + 1, _BASE)
    powers[0] = 1
    powers = np.cumprod(powers)
    sums = np.zeros_like(powers)
    np.cumsum((codes + np.uint64(1)) * powers[:-1], out=sums[1:])
    return sums, powers[::-1]


def _slots(differences: Numbers, powers: Numbers) -> Numbers:
    """A number below 2 ** _SLOT_BITS for each part of the text, the same for the same part."""
    mixed = differences * powers
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX
    mixed >>= np.uint64(64 - _SLOT_BITS)
    return mixed
