"""Pebble's scenes as one table for models of any form: features, captions, questions, answers.

    scene --draw, pebble's frozen tower--> features [64, 256]
          --caption-->                     words
          --questions of one value-->      words, and one of a closed list of answers

Words stand for themselves, and an answer of two words ("top left") is one entry of the vocabulary,
so that an answer is one choice for every form. Everything is a function of the seeds of the scenes.
Knows no model but the tower.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from lapilli.modality.image.image import VisionTransformer
from lapilli.modality.projector import average_neighbours
from lapilli.nn.linear import rounded
from lapilli.shapes import Bool, Float, Int, Tensor
from pebble.caption import caption
from pebble.draw import draw, model_pixels
from pebble.palette import COLOURS
from pebble.questions import colour, count, exists, has_attribute, place, shape, size
from pebble.reference import Question
from pebble.relations import is_side
from pebble.sample import sample_scene
from pebble.scene import PLACES, SHAPES, SIZES, Scene
from pebble.tower import normalise

MAKERS: Final = (count, colour, shape, size, place, is_side, exists, has_attribute)
ANSWERS: Final = ("yes", "no", *map(str, range(4)), *COLOURS, *SHAPES, *SIZES, *PLACES)
"""What may be answered; other answers, such as lists of objects, are not asked for."""
SKILLS: Final = ("count", "colour", "shape", "size", "place", "relation", "yes/no")
PAD, UNKNOWN, MASK, DESCRIBE, ASK, END = range(6)
"""First entries of a vocabulary; DESCRIBE and ASK say what a text is for."""
_NUM_SPECIAL: Final = 6
POOL: Final = 2
"""Side of the squares of patches whose features are averaged: 16 features of a picture."""
MOST: Final = 3
"""Objects of a scene: with the five of pebble's world nothing here would learn in minutes."""
_ATTEMPTS: Final = 200
_TOWER_BATCH: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question about a scene; `answer` is a place in ANSWERS."""

    words: tuple[str, ...]
    answer: int
    skill: str


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a sentence in lower case, its marks as words of their own."""
    for mark in ",.?":
        text = text.replace(mark, f" {mark} ")
    return tuple(text.lower().split())


def questions_about(scene: Scene, number: int) -> list[Asked]:
    """Return different questions with one value as their answer, skill after skill in turn.

    Fewer where the scene does not allow so many.
    """
    rng = np.random.default_rng([scene.seed, 83])
    found: dict[str, Question] = {}
    for attempt in range(_ATTEMPTS):
        if len(found) == number:
            break
        question = MAKERS[attempt % len(MAKERS)](scene, rng)
        if question is not None and question.answer in ANSWERS:
            found.setdefault(question.text, question)
    return [
        Asked(words=words_of(one.text), answer=ANSWERS.index(one.answer), skill=one.skill)
        for one in found.values()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """A split: row i of everything belongs to scene i.

    Attributes:
        features: of the tower, in float16.
        captions: words of the complete description.
        questions: as many of every scene as it allows.
    """

    features: Float[Tensor, "N P E"]
    captions: tuple[tuple[str, ...], ...]
    questions: tuple[tuple[Asked, ...], ...]

    def __len__(self) -> int:
        return len(self.captions)


def few_objects(first_seed: int, count: int) -> list[Scene]:
    """Return the first scenes from a seed on that hold at most MOST objects."""
    drawn = (sample_scene(seed, "objects") for seed in itertools.count(first_seed))
    return list(itertools.islice((one for one in drawn if len(one.objects) <= MOST), count))


def make_scenes(first_seed: int, count: int, tower: VisionTransformer, *, questions: int) -> Scenes:
    """Return the first scenes from a seed on that hold few objects, as the tower sees them."""
    scenes = few_objects(first_seed, count)
    side = tower.config.image_size
    seen = []
    for start in range(0, count, _TOWER_BATCH):
        drawn = [model_pixels(draw(one), side) for one in scenes[start : start + _TOWER_BATCH]]
        with torch.inference_mode():
            found = tower(normalise(torch.from_numpy(np.stack(drawn))))
            seen.append(average_neighbours(found, tower.config.grid, POOL).half())
    return Scenes(
        features=torch.cat(seen).clone(),
        captions=tuple(words_of(caption(one)) for one in scenes),
        questions=tuple(tuple(questions_about(one, questions)) for one in scenes),
    )


def standardise(parts: Sequence[Scenes]) -> list[Scenes]:
    """Return scenes whose features have mean 0 and deviation 1 over the first of them."""
    known = parts[0].features.float().flatten(0, 1)
    mean, deviation = known.mean(0), known.std(0)
    return [
        replace(one, features=((one.features.float() - mean) / deviation).half()) for one in parts
    ]


class Vocabulary:
    """Numbers of words and of answers.

    An answer of one word is that word, so that what captions teach of it is known to questions;
    those of two words ("top left") have an entry of their own.

    Args:
        scenes: whose captions and questions have the words; others are UNKNOWN.
    """

    def __init__(self, scenes: Scenes) -> None:
        found = {word for one in scenes.captions for word in one}
        found.update(word for one in scenes.questions for asked in one for word in asked.words)
        self._ids = {word: _NUM_SPECIAL + i for i, word in enumerate(sorted({*found, *ANSWERS}))}
        self.answers: Int[Tensor, " n"] = torch.tensor([self._ids[one] for one in ANSWERS])

    def __len__(self) -> int:
        return _NUM_SPECIAL + len(self._ids)

    def ids(self, words: Sequence[str]) -> list[int]:
        """Return the numbers of words."""
        return [self._ids.get(word, UNKNOWN) for word in words]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts about pictures, those about one picture behind each other in a row, padded with PAD.

    Attributes:
        features: of the pictures.
        ids: of the row: every text begins with the entry that says what it is for.
        owner: number of the text in its row that a position belongs to; -1: padding.
        places: of every position in its own text, from 0.
        last: row and position of the end of every text, row after row.
        answers: of every text its place in ANSWERS; 0 where nothing is asked.
    """

    features: Float[Tensor, "B P E"]
    ids: Int[Tensor, "B T"]
    owner: Int[Tensor, "B T"]
    places: Int[Tensor, "B T"]
    last: Int[Tensor, "2 n"]
    answers: Int[Tensor, " n"]

    @property
    def known(self) -> Bool[Tensor, "B T"]:
        """Return which positions are no padding."""
        return self.owner >= 0

    @property
    def following(self) -> Int[Tensor, "B T"]:
        """Return what follows every position in its text, END behind it and PAD under padding."""
        found = torch.cat([self.ids[:, 1:], torch.full_like(self.ids[:, :1], PAD)], dim=1)
        found[self.last[0], self.last[1]] = END
        return found.where(self.known, PAD)

    def take(self, rows: Int[Tensor, " m"]) -> "Texts":
        """Return these rows, each of which has one text."""
        last = torch.stack([torch.arange(len(rows)), self.last[1, rows]])
        parts = (self.ids, self.owner, self.places)
        ids, owner, places = (part[rows] for part in parts)
        return Texts(self.features[rows], ids, owner, places, last, self.answers[rows])


def join_texts(
    features: Float[Tensor, "B P E"],
    texts: Sequence[Sequence[Sequence[int]]],
    answers: Sequence[int],
) -> Texts:
    """Return rows of texts.

    Args:
        features: of every row.
        texts: of every row the ids of its texts, what they are for in front.
        answers: of all texts, row after row.
    """
    rows = [
        [(word, at, place_) for at, ids in enumerate(of) for place_, word in enumerate(ids)]
        for of in texts
    ]
    table = torch.tensor([PAD, -1, 0]).repeat(len(rows), rounded(max(map(len, rows))), 1)
    last = []
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row)
        ends = np.cumsum([len(ids) for ids in texts[number]]) - 1
        last += [(number, int(end)) for end in ends]
    ids, owner, places = table.unbind(-1)
    return Texts(features, ids, owner, places, torch.tensor(last).T, torch.tensor(answers))


def captions_of(scenes: Scenes, rows: Sequence[int], vocabulary: Vocabulary) -> Texts:
    """Return the caption of each of these scenes."""
    texts = [[[DESCRIBE, *vocabulary.ids(scenes.captions[row])]] for row in rows]
    return join_texts(scenes.features[list(rows)].float(), texts, [0] * len(rows))


def questions_of(scenes: Scenes, rows: Sequence[int], vocabulary: Vocabulary) -> Texts:
    """Return the questions about each of these scenes; ASK stands at both ends of them."""
    asked = [scenes.questions[row] for row in rows]
    texts = [[[ASK, *vocabulary.ids(one.words), ASK] for one in of_row] for of_row in asked]
    answers = [one.answer for of_row in asked for one in of_row]
    return join_texts(scenes.features[list(rows)].float(), texts, answers)


def batches_of(count: int, size: int) -> Iterator[range]:
    """Yield the rows of a split, `size` at a time."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def most_frequent(scenes: Scenes) -> dict[str, int]:
    """Return the answer that each skill has most often."""
    counts: dict[str, Counter[int]] = {skill: Counter() for skill in SKILLS}
    for of_scene in scenes.questions:
        for asked in of_scene:
            counts[asked.skill][asked.answer] += 1
    return {skill: found.most_common(1)[0][0] for skill, found in counts.items() if found}
