"""Conversations about pool pictures for the loop; knows questions, encoding and features, no tower.

language   a picture is its words: each position is the sum of vectors of what lies on that patch,
           or its caption stands in the prompt as text
align      features of the tower, caption, plain template
instruct   features of the tower, several questions in one conversation
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lapilli.prompt.encode import EncodedPrompt
from lapilli.prompt.templates import TEMPLATES
from lapilli.prompt.tokenizer.base import Tokenizer
from lapilli.shapes import Bool, Float, Tensor
from lapilli.train.batch import TrainingBatch, by_length, collate
from lapilli.train.data import encode_sample
from lapilli.train.loop import Loss
from lapilli.train.order import draw_indices
from lapilli.train.pebble.caption import caption
from lapilli.train.pebble.conversation import (
    Sample,
    as_sample,
    caption_sample,
    draw_questions,
)
from lapilli.train.pebble.reference import Question
from lapilli.train.pebble.regions import LEXICON
from lapilli.train.pebble.sample import sample_scene
from lapilli.train.recipe import Recipe
from lapilli.train.stages import FeatureReader

_LONG = 24  # characters
_TEXT_SHARE = 0.2  # of the language stage: conversations whose picture is a sentence
Features = Callable[[int], Float[Tensor, "P E"]]


def word_features(packed: NDArray[np.uint8]) -> Features:
    """Region words of a picture as zeros and ones, float32 [P, len(LEXICON)]."""

    def features(index: int) -> Tensor:
        bits = np.unpackbits(packed[index], axis=-1, count=len(LEXICON))
        return torch.from_numpy(bits).float()

    return features


def patches_of_interest(packed: NDArray[np.uint8]) -> Callable[[int], Bool[Tensor, " P"]]:
    """Where the middles of objects lie in a picture, or what is written in it."""
    marks = [LEXICON.index(name) for name in ("word", "number", "handwritten")]

    def interest(index: int) -> Tensor:
        bits = np.unpackbits(packed[index], axis=-1, count=len(LEXICON)).astype(np.bool_)
        middles = bits[:, LEXICON.index("middle")]
        return torch.from_numpy(middles if middles.any() else bits[:, marks].any(-1))

    return interest


def stored_features(stored: NDArray[np.float16]) -> Features:
    """Features that the tower made earlier."""
    return lambda index: torch.from_numpy(stored[index].astype(np.float32))


def without_long(turns: list[Question], rng: np.random.Generator, share: float) -> list[Question]:
    """The turns, each long answer kept with this probability; its follow-up goes with it.

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


class TalkTask:
    """Rows for the stages that train a language model; see `lapilli.train.loop.Task`.

    Args:
        model: what is trained.
        recipe: batch size, seed, template, stage.
        tokenizer: of the language model.
        features: features of picture i.
        interest: patches of picture i that are always shown; the recipe's `patch_share` says how
            many of the others are. A lookup among five positions is learned with a fifth of the
            conversations that one among 64 takes, and then carries over.
        num_pictures: how many there are; picture i shows scene first_seed + i.
        first_seed: seed of picture 0.
        evaluator: figures for the log.
    """

    def __init__(
        self,
        model: FeatureReader,
        recipe: Recipe,
        tokenizer: Tokenizer,
        features: Features,
        *,
        interest: Callable[[int], Bool[Tensor, " P"]] | None = None,
        num_pictures: int,
        first_seed: int = 0,
        evaluator: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.model = model
        self._recipe, self._tokenizer, self._features = recipe, tokenizer, features
        self._num_pictures, self._first_seed = num_pictures, first_seed
        self._evaluator, self._interest = evaluator, interest
        self._rows = lru_cache(maxsize=1)(self._step_rows)

    def batch(self, step: int, micro: int) -> tuple[TrainingBatch, int]:
        """A micro-batch of rows of similar length."""
        rows, groups = self._rows(step)
        chosen = [rows[i] for i in groups[micro]]
        batch = collate([prompt for prompt, _ in chosen], [media for _, media in chosen])
        return batch, batch.num_valid

    def _step_rows(
        self, step: int
    ) -> tuple[list[tuple[EncodedPrompt, list[Tensor]]], list[list[int]]]:
        """All rows of a step, and which of them make each micro-batch."""
        run = self._recipe.run
        at = draw_indices(self._num_pictures, run.batch_size * run.accumulate, step, seed=run.seed)
        rows = [self._row(int(index), step) for index in at]
        return rows, by_length([len(prompt) for prompt, _ in rows], run.accumulate)

    def _row(self, index: int, step: int) -> tuple[EncodedPrompt, list[Tensor]]:
        scene = sample_scene(self._first_seed + index)
        rng = np.random.default_rng([scene.seed, step, 23])
        sample = self._sample(scene, rng)
        media = [self._shown(index, step, rng)] if "image" in sample else []
        lengths = [len(item) for item in media]
        template = TEMPLATES[self._recipe.data.template]
        return encode_sample(sample, template, self._tokenizer, lengths), media

    def _shown(self, index: int, step: int, rng: np.random.Generator) -> Tensor:
        """The picture's features, of fewer patches early in a curriculum."""
        features = self._features(index)
        data = self._recipe.data
        if self._interest is None or step >= data.full_after * self._recipe.run.steps:
            return features
        least, most = data.patch_share
        others = rng.random(len(features)) < rng.uniform(least, most)
        return features[self._interest(index) | torch.from_numpy(others)]

    def _sample(self, scene: Any, rng: np.random.Generator) -> Sample:  # noqa: ANN401
        if self._recipe.stage == "align":
            return caption_sample(scene)
        least, most = self._recipe.data.questions
        turns = draw_questions(scene, rng, least=least, most=most)
        turns = without_long(turns, rng, self._recipe.data.long_share)
        name = str(scene.seed)
        if self._recipe.stage == "language" and rng.random() < _TEXT_SHARE:
            return as_sample(name, turns, opening=f"{caption(scene)}\n", image=None)
        return as_sample(name, turns, opening="<image>\n", image=name)

    def loss(self, batch: TrainingBatch) -> Loss:
        """Cross entropy of the answers."""
        return self.model.loss(batch)

    def evaluate(self) -> Mapping[str, float]:
        """The evaluator's figures."""
        return {} if self._evaluator is None else self._evaluator()
