"""Prefix tree: pieces of prompts that begin alike, so that what they share is read once.

    "Is it red?"  "Is it blue?"  "Why?"     three pieces
    "Is it " -> "red?", "blue?"; "Why?"     four branches, each behind its parent

Media are equal where they are the same object. Knows ids and media; must not know a model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from lapilli.pipeline.backend import ProcessedPrompt
from lapilli.prompt.encode import EncodedPrompt, Span


@dataclass(frozen=True, slots=True)
class Branch:
    """Positions that every piece behind them shares.

    Attributes:
        parent: number of the branch that stands before; -1: none does.
        piece: what stands in it, at least one position.
    """

    parent: int
    piece: ProcessedPrompt


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Pieces as branches.

    Attributes:
        branches: in any order; those of one length and one place lie beside each other.
        ends: number of the branch that ends with each piece.
    """

    branches: tuple[Branch, ...]
    ends: tuple[int, ...]


def prefix_tree(pieces: Sequence[ProcessedPrompt]) -> PrefixTree:
    """Return pieces as a tree in which no two branches of one parent begin alike."""
    keys = [_keys(piece) for piece in pieces]
    found: list[tuple[int, int, int, int]] = []  # parent, a piece that has it, start, stop
    ends = [-1] * len(pieces)
    waiting = [(sorted(range(len(pieces)), key=keys.__getitem__), 0, -1)]
    while waiting:
        members, start, parent = waiting.pop()
        for _, alike in groupby(members, key=lambda i: keys[i][start]):
            some = list(alike)
            # They are sorted: what the first and the last share, all share.
            stop = start + shared_length(keys[some[0]][start:], keys[some[-1]][start:])
            longer = [i for i in some if len(keys[i]) > stop]
            for i in some[: len(some) - len(longer)]:
                ends[i] = len(found)
            if longer:
                waiting.append((longer, stop, len(found)))
            found.append((parent, some[0], start, stop))
    order = sorted(range(len(found)), key=lambda i: (found[i][3] - found[i][2], found[i][2]))
    place = {number: at for at, number in enumerate(order)} | {-1: -1}
    branches = tuple(
        Branch(place[parent], _between(pieces[piece], start, stop))
        for parent, piece, start, stop in map(found.__getitem__, order)
    )
    return PrefixTree(branches, tuple(place[end] for end in ends))


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many numbers two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def new_positions(piece: ProcessedPrompt, before: ProcessedPrompt) -> int:
    """Return how many positions a piece has that another, read with it, does not share."""
    return len(piece.encoded) - shared_length(_keys(before), _keys(piece))


def _keys(piece: ProcessedPrompt) -> list[int]:
    """Return a number for each position: its token, or one below zero of a medium and a place."""
    keys = list(piece.encoded.input_ids)
    for span, medium in zip(piece.encoded.spans, piece.media, strict=True):
        for at in range(span.length):
            keys[span.start + at] = -1 - (id(medium) << 32 | at)
    return keys


def _between(piece: ProcessedPrompt, start: int, stop: int) -> ProcessedPrompt:
    """Return positions start..stop of a piece, whose media lie inside or outside as a whole."""
    encoded = piece.encoded
    if (start, stop) == (0, len(encoded)):
        return piece
    inside = list(_inside(piece, start, stop))
    spans = tuple(
        Span(span.row, span.start - start, span.length, span.modality) for span, _ in inside
    )
    shorter = EncodedPrompt(encoded.input_ids[start:stop], encoded.loss_mask[start:stop], spans)
    return ProcessedPrompt(shorter, tuple(medium for _, medium in inside))


def _inside(piece: ProcessedPrompt, start: int, stop: int) -> Iterator[tuple[Span, object]]:
    for span, medium in zip(piece.encoded.spans, piece.media, strict=True):
        if start <= span.start < stop:
            yield span, medium
