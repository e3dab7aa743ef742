"""What a language model learns of next films, from histories as text or from users' vectors.

    stretches of histories --TextTask--> a film word behind every text that comes before it
                           --UserTask--> the film behind each of several places of a stretch

Both are what `lapilli.train.trainer.loop.train` runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from comparison.movies import Movies
from comparison.next_film import (
    FilmWords,
    Window,
    events_of,
    events_of_window,
    film_scores,
)
from lapilli.datasets.interactions import Interactions
from lapilli.modality.events import PreparedEvents
from lapilli.model import VisionLanguageModel
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.recipe import RunRecipe
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss, TrainingBatch, collate


def draw_windows(
    train: Interactions, count: int, events: int, rng: np.random.Generator
) -> list[Window]:
    """Draw stretches of at most `events` + 1 events, so that each event is as often predicted.

    The stretches end anywhere, also behind the last event: there they are cut.
    """
    lengths = np.bincount(train.users, minlength=len(train.user_ids))
    weights = np.where(lengths > 1, lengths + events - 1, 0)
    users = rng.choice(len(lengths), size=count, p=weights / weights.sum())
    found = []
    for user in users:
        first, length = train.of_user(int(user)).start, int(lengths[user])
        end = int(rng.integers(2, length + events))
        rows = slice(first + max(0, end - events - 1), first + min(end, length))
        found.append(Window.of(train, rows))
    return found


@dataclass
class TextTask:
    """Histories as text for a language model; what `lapilli.train.trainer.loop.train` runs."""

    vlm: VisionLanguageModel
    words: FilmWords
    movies: Movies
    run: RunRecipe
    events: int
    model: TrainedModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = TrainedModel(self.vlm.requires_grad_(True))

    def batch(self, step: int, micro: int) -> tuple[TrainingBatch, int]:
        """Return stretches of histories and how many films they predict."""
        rng = np.random.default_rng([self.run.seed, step, micro, 61])
        windows = draw_windows(self.movies.split.train, self.run.batch_size, self.events, rng)
        made = collate([EncodedSample(self.words.text(one)) for one in windows])
        return made, made.num_valid

    def loss(self, batch: TrainingBatch) -> Loss:
        """Return the summed loss of all films."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: what is held out is ranked, not read."""
        return {}


@dataclass(frozen=True, slots=True)
class UserBatch:
    """Stretches of histories, of which the first events, as many as each of `cuts`, are users."""

    windows: tuple[PreparedEvents, ...]
    cuts: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Return the number of a stretch and how many of its events are known."""
        return [
            (i, cut)
            for cut in self.cuts
            for i, one in enumerate(self.windows)
            if cut < len(one.categories)
        ]


class UserModel(nn.Module):
    """A language model that is told of users by their features; see `UserTask`."""

    def __init__(self, vlm: VisionLanguageModel, words: FilmWords) -> None:
        super().__init__()
        self.vlm, self._words = vlm, words

    def train(self, mode: bool = True) -> "UserModel":
        """Set the mode; an encoder that rests does so without dropout."""
        super().train(mode)
        encoder = events_of(self.vlm).encoder
        encoder.train(mode and any(p.requires_grad for p in encoder.parameters()))
        return self

    def forward(self, batch: UserBatch) -> Loss:
        """Return the summed loss of the film behind every pair."""
        users = events_of(self.vlm)
        states = users.states(batch.windows)
        features = users.project([states[i][:cut] for i, cut in batch.pairs])
        films = [int(batch.windows[i].categories[cut, 0]) - 1 for i, cut in batch.pairs]
        scores = film_scores(self.vlm, self._words, features)
        targets = torch.tensor(films, device=scores.device)
        right = (scores.detach().argmax(dim=-1) == targets).sum()
        return Loss(F.cross_entropy(scores, targets, reduction="sum"), {"right": right})


@dataclass
class UserTask:
    """Users and what they watched next, for a model with an encoder of events.

    The encoder reads a stretch of a history once; what is known behind `cuts` of its events are as
    many users. What learns is what requires a gradient.
    """

    vlm: VisionLanguageModel
    words: FilmWords
    movies: Movies
    run: RunRecipe
    events: int
    cuts: int = 8
    model: UserModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = UserModel(self.vlm, self.words)

    def batch(self, step: int, micro: int) -> tuple[UserBatch, int]:
        """Return stretches of histories and how many films are predicted."""
        rng = np.random.default_rng([self.run.seed, step, micro, 67])
        windows = draw_windows(self.movies.split.train, self.run.batch_size, self.events, rng)
        users = events_of(self.vlm)
        prepared = tuple(users.windows(events_of_window(self.movies, one))[0] for one in windows)
        longest = max(len(one.categories) for one in prepared)
        cuts = rng.choice(np.arange(1, longest), size=min(self.cuts, longest - 1), replace=False)
        made = UserBatch(prepared, tuple(sorted(map(int, cuts))))
        return made, len(made.pairs)

    def loss(self, batch: UserBatch) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return nothing: what is held out is ranked, not read."""
        return {}
