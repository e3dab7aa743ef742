"""Pretraining of an encoder of events: every event of a history is predicted from those before it.

    histories --windows--> pieces of max_events --similar lengths--> micro-batches
              --encoder--> states --heads, tables read the other way--> cross-entropies, summed

The encoder learns by itself, before a language model sees it; the projector rests. Knows histories
as a modality prepares them; must not know prompts, language models or files.

Source: Ning et al. 2024 (User-LLM), section 3.1: next-event prediction, the sum of the features'
    cross-entropies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lapilli.errors import ConfigError
from lapilli.generate.engine.feature_cache import content_digest
from lapilli.modality import Modality
from lapilli.modality.events import EventsModality, PreparedEvents
from lapilli.train.data.sampler import OrderByLength
from lapilli.train.recipe import RunRecipe
from lapilli.train.trainer.task import Loss, Plain


class NextEventModel(nn.Module):
    """An encoder of events in training; its parameters carry `modality.` before their names."""

    def __init__(self, modality: EventsModality) -> None:
        super().__init__()
        self.modality = modality.requires_grad_(False)
        modality.encoder.requires_grad_(True)

    def forward(self, items: Sequence[PreparedEvents]) -> Loss:
        """Return the cross-entropies of all next events, summed, and those of every feature."""
        losses, _ = self.modality.next_event_losses(items)
        names = [feature.name for feature in self.modality.config.categorical]
        parts = {name: loss.detach() for name, loss in zip(names, losses, strict=True)}
        return Loss(torch.stack(losses).sum(), parts)


@dataclass
class NextEventTask:
    """Histories for an encoder; what `lapilli.train.trainer.loop.train` runs.

    Attributes:
        modality: whose encoder learns, in place.
        histories: as `EventsModality.prepare` takes them; long ones are learned in pieces.
        run: the run's section of the recipe: batch_size is in histories.
        held_out: histories that are only predicted; `eval_loss` is per event.

    Raises:
        ConfigError: no modality of events, or nothing to predict.
        MediaError: a history that cannot be read.
    """

    modality: Modality
    histories: Sequence[object]
    run: RunRecipe
    held_out: Sequence[object] = ()
    model: NextEventModel = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.modality, EventsModality):
            raise ConfigError(
                "next events are predicted by a modality of the kind events, and "
                f"{self.modality.name!r} is a {type(self.modality).__name__}"
            )
        self._events = self.modality
        if self._events.config.max_events < 2:
            raise ConfigError(
                f"{self._events.name}: max_events is 1, and a history of one event predicts none: "
                "give it at least 2"
            )
        self._pieces = self._cut(self.histories)
        self._held_out = self._cut(self.held_out)
        if not self._pieces:
            raise ConfigError(
                f"none of {len(self.histories)} histories has a second event: there is nothing to "
                "predict"
            )
        self.model = NextEventModel(self._events)
        lengths = [len(piece.categories) for piece in self._pieces]
        self._order = OrderByLength(lengths, self.run, stream=43)

    @property
    def num_samples(self) -> int:
        """Return the pieces of histories of one epoch."""
        return len(self._pieces)

    def fingerprint(self) -> Mapping[str, Plain]:
        """Return what decides the batches."""
        return {
            "histories": content_digest(self._pieces).hex(),
            "run.seed": self.run.seed,
            "run.batch_size": self.run.batch_size,
            "run.gradient_accumulation_steps": self.run.gradient_accumulation_steps,
        }

    def batch(self, step: int, micro: int) -> tuple[list[PreparedEvents], int]:
        """Return pieces of similar length and how many events they predict.

        Pieces that fill no micro-batch of an epoch wait for another one.
        """
        made = [self._pieces[i] for i in self._order.indices(step, micro)]
        return made, _count(made)

    def loss(self, batch: Sequence[PreparedEvents]) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return the loss per event of what is held out, and that of every feature."""
        if not self._held_out:
            return {}
        sums: dict[str, float] = {}
        longest_first = sorted(self._held_out, key=lambda piece: -len(piece.categories))
        for start in range(0, len(longest_first), self.run.batch_size):
            loss = self.loss(longest_first[start : start + self.run.batch_size])
            for name, part in {"loss": loss.total.detach(), **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + float(part)
        return {f"eval_{name}": value / _count(self._held_out) for name, value in sums.items()}

    def _cut(self, histories: Sequence[object]) -> list[PreparedEvents]:
        return [piece for history in histories for piece in self._events.windows(history)]


def _count(items: Sequence[PreparedEvents]) -> int:
    return sum(len(item.categories) - 1 for item in items)
