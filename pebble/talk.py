"""Conversations about pool pictures for the loop; knows questions, encoding and features, no tower.

language   a picture is its words: each position is the sum of vectors of what lies on that patch,
           or its caption stands in the prompt as text
align      features of the tower, caption, plain template
instruct   features of the tower, several questions in one conversation; some conversations
           begin without a picture, and there every question is answered by asking for one
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lapilli.errors import DataError
from lapilli.prompt.choose import Template
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.template import TEMPLATES
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor
from lapilli.train.data import to_sample
from lapilli.train.data.sampler import draw_indices
from lapilli.train.trainer.loop import Loss
from lapilli.train.trainer.task import TrainingBatch, collate
from pebble.blind import blind_question
from pebble.caption import caption
from pebble.conversation import (
    Sample,
    as_sample,
    caption_sample,
    draw_questions,
)
from pebble.pointing import (
    DEPTH,
    HEADS,
    Looks,
    Pointers,
    QueriesAndKeys,
    collate_looks,
    looks,
    pointing_loss,
)
from pebble.reader import FeatureReader
from pebble.recipe import PebbleRecipe
from pebble.reference import Question
from pebble.regions import LEXICON
from pebble.scene import Scene
from pebble.typed import wide_scene

_LONG = 24  # characters
_TEXT_SHARE = 0.2  # of the language stage: conversations whose picture is a sentence
# Of the last stage: conversations that begin without a picture, and those of them that stay so.
_BLIND_SHARE = 0.12
_STAYS_BLIND = 0.75
_MOST_BLIND = 6  # turns
Features = Callable[[int], Float[Tensor, "P E"]]


def word_features(packed: NDArray[np.uint8]) -> Features:
    """Region words of a picture as zeros and ones, float32 [P, len(LEXICON)]."""

    def features(index: int) -> Tensor:
        bits = np.unpackbits(packed[index], axis=-1, count=len(LEXICON))
        return torch.from_numpy(bits).float()

    return features


def stored_features(stored: NDArray[np.float16]) -> Features:
    """Features that the tower made earlier."""
    return lambda index: torch.from_numpy(stored[index].astype(np.float32))


def without_long(turns: list[Question], rng: np.random.Generator, share: float) -> list[Question]:
    """Return the turns, each long answer kept with this probability; its follow-up goes with it.

    A description has as many tokens as all other answers of a conversation together: while a
    model learns to find things, they would be half of its loss.
    """
    kept: list[Question] = []
    dropped = False
    for turn in turns:
        dropped = (dropped and turn.needs_previous) or (
            len(turn.answer) > _LONG and rng.random() >= share
        )
        if not dropped:
            kept.append(turn)
    return kept or turns


def by_length(lengths: Sequence[int], pieces: int) -> list[list[int]]:
    """Row numbers in `pieces` groups of similar length, longest first.

    The micro-batches of one step: their padding shrinks, and their sum does not change.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    size = -(-len(order) // pieces)
    return [order[start : start + size] for start in range(0, len(order), size)]


def encode_sample(
    record: Mapping[str, Any],
    template: Template,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
) -> EncodedPrompt:
    """Return the row of a record whose pictures somebody has prepared already.

    Args:
        record: of any format, see formats.py.
        template: how turns become text.
        tokenizer: of the language model.
        lengths: positions of each of its images.

    Raises:
        DataError: nothing in the row is supervised.
        PromptError: turns that the template cannot have.
    """
    sample = to_sample(record, where=f"sample {record.get('id')!r}")
    segments = template.render(sample.messages, open_turn=False)
    prompt = encode(segments, tokenizer, lengths)
    if not any(prompt.loss_mask):
        raise DataError(f"{sample.where} has no supervised token: every answer in it is empty")
    return prompt


def begun_blind(
    scene: Scene, turns: list[Question], rng: np.random.Generator
) -> tuple[list[Question], Sample]:
    """Return a conversation that begins without a picture; in some the picture comes later."""
    most = _MOST_BLIND if rng.random() < _STAYS_BLIND else 2
    blind = [blind_question(scene, rng) for _ in range(int(rng.integers(1, most + 1)))]
    name = str(scene.seed)
    if most == _MOST_BLIND:
        return blind, as_sample(name, blind, opening="", image=None)
    talk = [*blind, *turns]
    return talk, as_sample(name, talk, opening="<image>\n", image=name, first=len(blind))


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One conversation with its features and, where attention is taught, its looks."""

    prompt: EncodedPrompt
    media: list[Tensor]
    looks: Looks
    id: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TalkBatch:
    """Rows to learn from, and where their attention should fall, by kind of look."""

    rows: TrainingBatch
    pointers: Mapping[str, Pointers]


class TalkTask:
    """Rows for the stages that train a language model; see `lapilli.train.trainer.loop.Task`.

    Args:
        model: what is trained.
        recipe: batch size, seed, template, stage.
        tokenizer: of the language model.
        features: features of picture i.
        num_pictures: how many there are; picture i shows scene first_seed + i.
        first_seed: seed of picture 0.
        evaluator: figures for the log.
    """

    def __init__(
        self,
        model: FeatureReader,
        recipe: PebbleRecipe,
        tokenizer: Tokenizer,
        features: Features,
        *,
        num_pictures: int,
        first_seed: int = 0,
        evaluator: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.model = model
        self._recipe, self._tokenizer, self._features = recipe, tokenizer, features
        self._num_pictures, self._first_seed = num_pictures, first_seed
        self._evaluator = evaluator
        self._rows = lru_cache(maxsize=1)(self._step_rows)

    def batch(self, step: int, micro: int) -> tuple[TalkBatch, int]:
        """Return a micro-batch of rows of similar length."""
        rows, groups = self._rows(step)
        chosen = [rows[i] for i in groups[micro]]
        batch = collate(chosen)
        width = batch.input_ids.shape[1]
        pointers = {
            kind: collate_looks([row.looks.get(kind, ()) for row in chosen], width)
            for kind in (HEADS if self._recipe.data.pointing else ())
        }
        return TalkBatch(batch, pointers), batch.num_valid

    def _step_rows(self, step: int) -> tuple[list[EncodedSample], list[list[int]]]:
        """All rows of a step, and which of them make each micro-batch."""
        run = self._recipe.run
        at = draw_indices(
            self._num_pictures,
            run.batch_size * run.gradient_accumulation_steps,
            step,
            seed=run.seed,
        )
        rows = [self._row(int(index), step) for index in at]
        return rows, by_length([len(row.prompt) for row in rows], run.gradient_accumulation_steps)

    def _row(self, index: int, step: int) -> EncodedSample:
        scene = wide_scene(self._first_seed + index)
        rng = np.random.default_rng([scene.seed, step, 23])
        turns = [] if self._recipe.stage == "align" else self._turns(scene, rng)
        if self._recipe.stage == "instruct" and rng.random() < _BLIND_SHARE:
            turns, sample = begun_blind(scene, turns, rng)
        else:
            sample = self._sample(scene, turns, rng)
        media = [self._features(index)] if "image" in sample else []
        lengths = [len(item) for item in media]
        template = TEMPLATES[self._recipe.data.template]
        prompt = encode_sample(sample, template, self._tokenizer, lengths)
        if not (self._recipe.data.pointing and media and turns):
            return EncodedSample(prompt, media, {}, str(scene.seed))
        side = isqrt(lengths[0])
        found = looks(prompt, turns, self._tokenizer, scene, side)
        return EncodedSample(prompt, media, found, str(scene.seed))

    def _turns(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        least, most = self._recipe.data.questions
        turns = draw_questions(scene, rng, least=least, most=most)
        return without_long(turns, rng, self._recipe.data.long_share)

    def _sample(self, scene: Scene, turns: list[Question], rng: np.random.Generator) -> Sample:
        if self._recipe.stage == "align":
            return caption_sample(scene)
        name = str(scene.seed)
        if self._recipe.stage == "language" and rng.random() < _TEXT_SHARE:
            return as_sample(name, turns, opening=f"{caption(scene)}\n", image=None)
        return as_sample(name, turns, opening="<image>\n", image=name)

    def loss(self, batch: TalkBatch) -> Loss:
        """Cross entropy of the answers, and of where attention falls when it is taught."""
        if not batch.pointers:
            return self.model.loss(batch.rows)
        with QueriesAndKeys() as seen:
            answers = self.model.loss(batch.rows)
        kinds, each = {}, max(len(seen.layers) // DEPTH, 1)
        for kind, pointers in batch.pointers.items():
            layer, head = HEADS[kind]
            queries, keys = seen.layers[layer * each]
            kinds[kind] = pointing_loss(queries, keys, pointers, head=head)
        number = batch.rows.num_valid
        parts = {kind: float(loss.detach()) * number for kind, loss in kinds.items()}
        parts["answers"] = float(answers.total.detach())
        weight = self._recipe.data.pointing * number
        return Loss(answers.total + weight * sum(kinds.values()), parts)

    def evaluate(self) -> Mapping[str, float]:
        """Return the evaluator's figures."""
        return {} if self._evaluator is None else self._evaluator()
