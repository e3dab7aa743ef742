"""Where a model should look while it reads and answers: attention that is taught, not awaited.

    layer 0   every word looks at the word before it, another head at the one before that
    layer 1   the last word of "the small red star" looks at that star's patches, or, as far as
              there is none, at the first position; of "red stars" equally at all of them
    layer 2   an answer looks at what its question named first, another head at what it named
              last, a third at "left" or "above"; a list looks at what it listed last
    layer 3   what is about to be said is looked at: the second object of a list before "a";
              another head looks, at the end of an object's phrase, at what is still to be said

Which patches answer a question is known when a scene is drawn. A model that has to find out by
itself still guesses colours after a hundred thousand questions. Its weights are those of any other
model: nothing of this is left in them but what they have learned.

Source: supervised attention as in Liu et al. 2016 (arXiv 1609.04186), there for translation.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812  torch's own habit
from torch.overrides import TorchFunctionMode

from lapilli.nn.attention import attention_backward
from lapilli.prompt.encode import EncodedPrompt
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Bool, Float, Int, Tensor
from pebble.glyphs import Glyph
from pebble.reference import Question
from pebble.regions import shown_patches
from pebble.scene import SHAPES, Object, Scene

_NOTHING: Final = (0,)  # where to look when there is nothing to see
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
_NOUN: Final = re.compile(rf"\b({'|'.join(SHAPES)})\b")
_SIDE: Final = re.compile(r"left|right|above|over|below|under")
_ANSWER: Final = "ASSISTANT:"


class Head(NamedTuple):
    """One attention head."""

    layer: int
    head: int


HEADS: Final = {
    "before": Head(0, 0),
    "second before": Head(0, 1),
    "named": Head(1, 0),
    "asked first": Head(2, 0),
    "asked last": Head(2, 1),
    "asked side": Head(2, 2),
    "said": Head(3, 0),
    "left over": Head(3, 1),
}
"""Who learns each kind of look, in a model of `DEPTH` layers."""
DEPTH: Final = 5
"""With twice as many, layer 1 of `HEADS` is layer 2 of the model, where grow.py puts it."""


@dataclass(frozen=True, slots=True)
class Look:
    """One position and what it should look at: groups of positions, an equal share for each."""

    position: int
    groups: tuple[tuple[int, ...], ...]


Looks = Mapping[str, Sequence[Look]]
"""The looks of one row, by kind."""


@dataclass(frozen=True, slots=True)
class Pointers:
    """Looks of a batch, one entry for each of M groups.

    Attributes:
        row: row of each.
        position: position of each within its row.
        seen: the group's positions.
        weight: the group's share; the shares of a look sum to 1.
    """

    row: Int[Tensor, " M"]
    position: Int[Tensor, " M"]
    seen: Bool[Tensor, "M T"]
    weight: Float[Tensor, " M"]


class QueriesAndKeys(TorchFunctionMode):
    """Inside, keeps queries and keys of every attention, one entry per layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401  torch's protocol
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  torch's protocol
        """Return the function itself."""
        if func in (F.scaled_dot_product_attention, attention_backward):
            self.layers.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def pointing_loss(
    queries: Float[Tensor, "B Q T A"],
    keys: Float[Tensor, "B Q T A"],
    pointers: Pointers,
    *,
    head: int,
) -> Float[Tensor, ""]:
    """Mean cross entropy between a head's attention and where it should fall."""
    if not len(pointers.row):
        return queries.new_zeros(())
    q, k = queries[:, head] * queries.shape[-1] ** -0.5, keys[:, head]
    scores = (q @ k.transpose(-1, -2))[pointers.row, pointers.position].float()  # [M, T]
    ahead = torch.arange(k.shape[1]) > pointers.position[:, None]
    scores = scores.masked_fill(ahead, float("-inf"))
    right = scores.masked_fill(~pointers.seen, float("-inf")).logsumexp(-1)
    missed = pointers.weight * (scores.logsumexp(-1) - right)
    mean: Tensor = missed.sum() / pointers.weight.sum()
    return mean


def looks(
    prompt: EncodedPrompt,
    turns: Sequence[Question],
    tokenizer: Tokenizer,
    scene: Scene,
    side: int,
) -> Looks:
    """Return what the positions of a conversation about one picture should look at.

    Args:
        prompt: the conversation, encoded; its one span is the picture, all side * side patches.
        turns: what was asked and answered, in the order of the prompt.
        tokenizer: that encoded it.
        scene: what the picture shows.
        side: patches of one row of the picture.
    """
    return _Reading(prompt, tokenizer, scene, side).looks(turns)


@dataclass
class _Reading:
    """One pass over a row's text."""

    prompt: EncodedPrompt
    tokenizer: Tokenizer
    scene: Scene
    side: int
    found: dict[str, list[Look]] = field(default_factory=lambda: {kind: [] for kind in HEADS})

    def looks(self, turns: Sequence[Question]) -> Looks:
        self.text, self.starts = _text(self.prompt, self.tokenizer)
        self.mentions: dict[Object | Glyph, int] = {}  # the position that named it last
        self.at = 0
        self._look_back()
        previous: Question | None = None
        for turn in turns:
            self.at = self.text.index(turn.text, self.at)
            asked = self._read_question(turn, previous)
            self.side_word = self._side(turn)
            self.at = self.text.index(_ANSWER, self.at) + len(_ANSWER)
            self._read_answer(turn, asked)
            previous = turn
        return self.found

    def _patches(self, item: Object | Glyph) -> tuple[int, ...]:
        start = self.prompt.spans[0].start
        covered = shown_patches(self.scene, item, self.side).flatten()
        return tuple(start + int(patch) for patch in covered.nonzero()[0])

    def _look_back(self) -> None:
        span = self.prompt.spans[0]
        for distance, kind in ((1, "before"), (2, "second before")):
            for first, end in ((0, span.start), (span.start + span.length, len(self.prompt))):
                self.found[kind] += [
                    Look(i, ((i - distance,),)) for i in range(first + distance, end)
                ]

    def _read_question(self, turn: Question, previous: Question | None) -> list[int]:
        """Positions that say what the question is about."""
        if turn.needs_previous and previous is not None:
            named = None if previous.about is None else self.mentions.get(previous.about)
            return [] if named is None else [named]
        asked = []
        for phrase, items in turn.names:
            self.at = self._find(phrase)
            last = self._position(self.at + len(phrase) - 1)
            self._name(last, items)
            asked.append(last)
            self.at += len(phrase)
        return asked

    def _side(self, turn: Question) -> int | None:
        """Return the position of "left" in "to the left of"."""
        word = _SIDE.search(turn.side)
        if word is None:
            return None
        start = self.text.rindex(turn.text, 0, self.at + len(turn.text))
        return self._position(self.text.index(turn.side, start) + word.end() - 1)

    def _read_answer(self, turn: Question, asked: list[int]) -> None:
        first = self._position(self.at - 1)
        self._ask(first, asked)
        if turn.answer == "nothing":
            self.found["said"].append(Look(first, (_NOTHING,)))
        for number, (phrase, items) in enumerate(turn.says):
            self.at = self._find(phrase)
            begin, last = self._position(self.at), self._position(self.at + len(phrase) - 1)
            for position in range(begin - 1, last):
                self.found["said"].append(Look(position, tuple(self._shown(items))))
                if position != first:
                    self._ask(position, asked)
            noun = _NOUN.search(phrase)
            if noun is not None:
                named = self._position(self.at + noun.end() - 1)
                self._name(named, items)
                if not turn.names:
                    asked = [named]
                self._ask(last, [named])
                later = [self._shown(more)[0] for _, more in turn.says[number + 1 :]]
                self.found["left over"].append(Look(last, (_NOTHING, *later)))
            self.at += len(phrase)

    def _ask(self, position: int, asked: list[int]) -> None:
        if asked:
            self.found["asked first"].append(Look(position, ((asked[0],),)))
            self.found["asked last"].append(Look(position, ((asked[-1],),)))
        if self.side_word is not None:
            self.found["asked side"].append(Look(position, ((self.side_word,),)))

    def _name(self, position: int, items: Sequence[Object | Glyph]) -> None:
        self.found["named"].append(Look(position, (_NOTHING, *self._shown(items))))
        self.mentions.update(dict.fromkeys(items, position))

    def _shown(self, items: Iterable[Object | Glyph]) -> list[tuple[int, ...]]:
        return [self._patches(item) for item in items]

    def _find(self, phrase: str) -> int:
        match = re.compile(rf"(?<![a-z]){re.escape(phrase)}(?![a-z])").search(self.text, self.at)
        if match is None:
            raise ValueError(f"{phrase!r} does not stand in {self.text[self.at :]!r}")
        return match.start()

    def _position(self, place: int) -> int:
        """Return the position whose token holds the character."""
        return bisect_right(self.starts, place) - 1


def _text(prompt: EncodedPrompt, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Return the row's text without its pictures, and where in it every position starts."""
    under = {i for span in prompt.spans for i in range(span.start, span.start + span.length)}
    text, starts = "", []
    for i, index in enumerate(prompt.input_ids):
        starts.append(len(text))
        if i not in under and index > 2:  # 0 to 2 are controls
            piece = tokenizer.id_to_token(index).replace("\u2581", " ")
            text += _BYTE.sub(lambda match: chr(int(match[1], 16)), piece)
    return text, starts


def collate_looks(rows: Sequence[Sequence[Look]], length: int) -> Pointers:
    """Return the looks of a batch whose rows are padded to `length`."""
    entries = [
        (row, look.position, group, 1.0 / len(look.groups))
        for row, items in enumerate(rows)
        for look in items
        for group in look.groups
    ]
    seen = torch.zeros(len(entries), length, dtype=torch.bool)
    for i, (_, _, group, _) in enumerate(entries):
        seen[i, list(group)] = True
    return Pointers(
        torch.tensor([row for row, _, _, _ in entries], dtype=torch.long),
        torch.tensor([position for _, position, _, _ in entries], dtype=torch.long),
        seen,
        torch.tensor([weight for _, _, _, weight in entries]),
    )
