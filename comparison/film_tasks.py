"""What is learned of next films: by an encoder of events, by a language model, by both together.

    stretches of histories --EventTask--> features of the event behind every other, by an encoder
                           --TextTask---> a film word behind every text that comes before it
                           --UserTask---> the film behind each of several places of a stretch

All of them are what `lapilli.train.trainer.loop.train` runs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from comparison.baselines import stretches
from comparison.movies import Movies
from comparison.next_film import (
    FilmWords,
    Window,
    events_of,
    events_of_window,
    film_scores,
)
from lapilli.datasets.interactions import Interactions
from lapilli.modality.events import EventsModality, PreparedEvents
from lapilli.model import VisionLanguageModel
from lapilli.shapes import Bool, Int, Tensor
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.recipe import RunRecipe
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss, TrainingBatch, collate

Validate = Callable[[], float]
"""Says how well the model that learns ranks the films of the validation."""


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
    validate: Validate | None = None
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
        """Return the validation's negative NDCG, of which the lowest is the best."""
        return {} if self.validate is None else {"eval_loss": -self.validate()}


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Stretches of histories, and the films that each user had watched before the stretch."""

    windows: tuple[PreparedEvents, ...]
    watched: tuple[Int[Tensor, " _"], ...]

    def excluded(self, size: int) -> Bool[Tensor, "n V"]:
        """Return which of `size` films cannot follow each event that has one behind it."""
        found = []
        for window, earlier in zip(self.windows, self.watched, strict=True):
            films = window.categories[:-1, 0]
            seen = torch.zeros(len(films), size, dtype=torch.bool)
            seen[:, earlier] = True
            rows, columns = torch.tril_indices(len(films), len(films)).unbind()
            seen[rows, films[columns]] = True
            found.append(seen)
        return torch.cat(found)


class EventModel(nn.Module):
    """An encoder of events that learns what follows each of them; see `EventTask`."""

    def __init__(self, users: EventsModality) -> None:
        super().__init__()
        self.users = users.requires_grad_(False)
        users.encoder.requires_grad_(True)

    def forward(self, batch: EventBatch) -> Loss:
        """Return the losses of all features of what follows, the film among those left."""
        encoder = self.users.encoder
        states = torch.cat([state[:-1] for state in self.users.states(batch.windows)])
        following = torch.cat([window.categories[1:] for window in batch.windows])
        excluded = batch.excluded(encoder.tables[0].num_embeddings)  # type: ignore[arg-type]
        losses = [
            encoder.loss(states, values, feature, excluded=None if feature else excluded)
            for feature, values in enumerate(encoder.values(following))
        ]
        return Loss(torch.stack(losses).sum(), {"film": losses[0].detach()})


class EventStretches:
    """Draws batches of stretches of histories, the same for the same step.

    Histories are cut elsewhere in each epoch. Events of one user at one time have no order that
    means something, so each epoch draws one.

    Args:
        users: prepares the events.
        movies: whose training events are drawn.
        run: its batch size and seed.
        events: of a stretch, with one more that is only predicted.
    """

    def __init__(self, users: EventsModality, movies: Movies, run: RunRecipe, events: int) -> None:
        self._train, self._run, self._events = movies.split.train, run, events
        one_by_one = (Window.of(self._train, slice(at, at + 1)) for at in range(len(self._train)))
        pieces = [users.prepare(events_of_window(movies, one)).categories for one in one_by_one]
        self._categories = torch.cat(pieces)
        self._lengths = [len(self._train.history(n)) for n in range(len(self._train.user_ids))]
        pieces_of_all = sum(math.ceil(max(0, length - 1) / events) for length in self._lengths)
        self._steps = max(1, math.ceil(pieces_of_all / run.batch_size))
        self._drawn: dict[int, tuple[np.ndarray, list[tuple[int, slice]]]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Return how many batches all histories fill."""
        return self._steps

    def batch(self, step: int) -> EventBatch:
        """Return the stretches of a step."""
        epoch, at = divmod(step, self._steps)
        order, places = self._epoch(epoch)
        windows, watched = [], []
        for i in range(at * self._run.batch_size, (at + 1) * self._run.batch_size):
            user, where = places[i % len(places)]  # an epoch may be cut into fewer than it fills
            rows = torch.from_numpy(order[self._train.of_user(user)])
            events = self._categories[rows[where]]
            windows.append(PreparedEvents(events, torch.zeros(len(events), 0)))
            watched.append(self._categories[rows[: where.start], 0])
        return EventBatch(tuple(windows), tuple(watched))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[tuple[int, slice]]]:
        """Return the order of all events in an epoch, and where its stretches lie."""
        if epoch not in self._drawn:
            rng = np.random.default_rng([self._run.seed, epoch, 43])
            chance = rng.random(len(self._train))
            order = np.lexsort((chance, self._train.times, self._train.users))
            self._drawn = {epoch: (order, stretches(self._lengths, self._events, rng))}
        return self._drawn[epoch]


@dataclass
class EventTask:
    """Histories of events for an encoder alone.

    Films that a user has watched already are no candidates, as in the ranking that follows.
    """

    users: EventsModality
    drawn: EventStretches
    validate: Validate | None = None
    model: EventModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = EventModel(self.users)

    def batch(self, step: int, micro: int) -> tuple[EventBatch, int]:
        """Return stretches of histories and how many events they predict."""
        made = self.drawn.batch(step)
        return made, sum(len(window.categories) - 1 for window in made.windows)

    def loss(self, batch: EventBatch) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return the validation's negative NDCG, of which the lowest is the best."""
        return {} if self.validate is None else {"eval_loss": -self.validate()}


@dataclass(frozen=True, slots=True)
class UserBatch:
    """Stretches of histories, of which the first events, as many as each of `cuts`, are users."""

    events: EventBatch
    cuts: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Return the number of a stretch and how many of its events are known."""
        return [
            (i, cut)
            for cut in self.cuts
            for i, one in enumerate(self.events.windows)
            if cut < len(one.categories)
        ]

    def excluded(self, size: int) -> Bool[Tensor, "U V"]:
        """Return which of `size` films the user of every pair has watched."""
        lengths = [len(one.categories) - 1 for one in self.events.windows]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        return self.events.excluded(size)[[int(starts[i]) + cut - 1 for i, cut in self.pairs]]


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
        windows = batch.events.windows
        states = users.states(windows)
        features = users.project([states[i][:cut] for i, cut in batch.pairs])
        films = [int(windows[i].categories[cut, 0]) - 1 for i, cut in batch.pairs]
        scores = film_scores(self.vlm, self._words, features)
        watched = batch.excluded(scores.shape[1] + 1)[:, 1:].to(scores.device)  # 0 is unknown
        scores = scores.masked_fill(watched, torch.finfo(scores.dtype).min)
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
    drawn: EventStretches
    seed: int = 0
    cuts: int = 8
    validate: Validate | None = None
    model: UserModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = UserModel(self.vlm, self.words)

    def batch(self, step: int, micro: int) -> tuple[UserBatch, int]:
        """Return stretches of histories and how many films are predicted."""
        rng = np.random.default_rng([self.seed, step, micro, 67])
        events = self.drawn.batch(step)
        longest = max(len(one.categories) for one in events.windows)
        cuts = rng.choice(np.arange(1, longest), size=min(self.cuts, longest - 1), replace=False)
        made = UserBatch(events, tuple(sorted(map(int, cuts))))
        return made, len(made.pairs)

    def loss(self, batch: UserBatch) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return the validation's negative NDCG, of which the lowest is the best."""
        return {} if self.validate is None else {"eval_loss": -self.validate()}
