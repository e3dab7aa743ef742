"""Events: a history of what somebody did, through a causal transformer of its own.

    {"film": [3, 7], "rating": [4.5, 2]}  --prepare-->  categories [n, M], numbers [n, R]
    --tables, joined--> [n, sum of widths + R] --linear--> [n, E] --causal layers--> [n, E]
    --projector--> [n, D], a position for every event or the last of them, or [m, D] behind a
                   resampler

Every state also predicts the next event: so the encoder is trained before a language model sees any
of it. The head of a feature is its own table, read the other way.

Source: Ning et al. 2024 (User-LLM), section 3.1.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lapilli.config.modalities import CategoricalFeature, EventsConfig
from lapilli.config.reader import shown
from lapilli.errors import MediaError
from lapilli.kernels.layer import rotate
from lapilli.modality.projector import build_projector, output_layers
from lapilli.nn.attention import attend
from lapilli.nn.layers import MLP, RMSNorm, Rotary
from lapilli.shapes import Bool, Float, Int, Tensor

UNKNOWN = 0
"""The row of every table that stands for a value nobody gave, and for padding."""


@dataclass(frozen=True, slots=True)
class PreparedEvents:
    """The features of the events of one history, oldest first.

    Attributes:
        categories: indices into the tables of the categorical features, in the order of the
            settings, as many of each as an event may have.
        numbers: the numeric features.
    """

    categories: Int[Tensor, "n M"]
    numbers: Float[Tensor, "n R"]


class EventLayer(nn.Module):
    """Causal attention with rotary positions, then an mlp, each after its norm."""

    def __init__(self, config: EventsConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_norm = RMSNorm(width, config.decoder.norm_eps)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width, config.decoder.norm_eps)
        self.mlp = MLP(width, config.decoder.intermediate_size, activation="gelu")
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B n E"], table: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "B n E"]:
        """Return the states after this layer."""
        heads = self.qkv_proj(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # [B, heads, n, A] each
        seen = attend(rotate(q, *table), rotate(k, *table), v)
        x = x + self.dropout(self.o_proj(seen.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class EventEncoder(nn.Module):
    """A table for every categorical feature, and causal layers over the joined vectors."""

    def __init__(self, config: EventsConfig) -> None:
        super().__init__()
        width, features = config.hidden_size, config.categorical
        # Features may be called as torch calls something, so their modules go by number.
        self.tables = nn.ModuleList(nn.Embedding(one.size, one.width) for one in features)
        self.input_proj = nn.Linear(sum(one.width for one in features) + len(config.numeric), width)
        self.layers = nn.ModuleList(EventLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(width, config.decoder.norm_eps)
        self.heads = nn.ModuleList(nn.Linear(width, one.width) for one in features)
        self.dropout = nn.Dropout(config.dropout)
        self._rotary = Rotary(config.decoder)
        self._most = [one.most for one in features]

    def forward(
        self, categories: Int[Tensor, "B n M"], numbers: Float[Tensor, "B n R"]
    ) -> Float[Tensor, "B n E"]:
        """Return the state behind every event; what follows an event does not change it."""
        device = next(self.parameters()).device
        values = self.values(categories.to(device))
        vectors = [_mean_vector(table, one) for table, one in zip(self.tables, values, strict=True)]
        numbers = numbers.to(device, vectors[0].dtype)
        x: Tensor = self.dropout(self.input_proj(torch.cat((*vectors, numbers), dim=-1)))
        positions = torch.arange(x.shape[1], device=device).expand(x.shape[:2])
        table = self._rotary.table(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, table)
        out: Tensor = self.norm(x)
        return out

    def values(self, categories: Int[Tensor, "... M"]) -> tuple[Int[Tensor, "... _"], ...]:
        """Return the values of every feature, as many as an event may have of it."""
        return torch.split(categories, self._most, dim=-1)

    def scores(self, states: Float[Tensor, "n E"], feature: int) -> Float[Tensor, "n V"]:
        """Return the scores of every value of a feature in the next event."""
        found: Tensor = self.heads[feature](states) @ self.tables[feature].weight.T
        return found

    def losses(
        self, states: Float[Tensor, "n E"], following: Int[Tensor, "n M"]
    ) -> list[Float[Tensor, ""]]:
        """Return per feature the cross-entropy of what follows n states, summed over them.

        Of several values of an event it is the mean; unknown values count nothing.
        """
        values = self.values(following.to(states.device))
        return [self.loss(states, one, feature) for feature, one in enumerate(values)]

    def loss(
        self,
        states: Float[Tensor, "n E"],
        values: Int[Tensor, "n k"],
        feature: int,
        *,
        excluded: Bool[Tensor, "n V"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the cross-entropy of one feature of what follows n states, summed over them.

        Args:
            states: behind n events.
            values: of the feature in the events that follow; unknown ones count nothing, and of
                several it is the mean.
            feature: its number.
            excluded: values that cannot follow, such as what a user has taken already: they are
                left out of the softmax. None of `values` may be one of them.
        """
        scores = self.scores(states, feature).float()
        if excluded is not None:
            scores = scores.masked_fill(excluded, torch.finfo(scores.dtype).min)
        known = values != UNKNOWN
        logs = scores.log_softmax(dim=-1).gather(-1, values)
        return -((logs * known).sum(dim=-1) / known.sum(dim=-1).clamp(min=1)).sum()


def _mean_vector(table: nn.Module, values: Int[Tensor, "... k"]) -> Float[Tensor, "... w"]:
    """Return the mean of the vectors of known values; that of the unknown where there are none."""
    vectors: Tensor = table(values)
    if values.shape[-1] == 1:
        return vectors.squeeze(-2)
    is_read = values != UNKNOWN
    is_read[..., 0] |= ~is_read.any(dim=-1)
    share = is_read.to(vectors.dtype)
    return (vectors * share[..., None]).sum(dim=-2) / share.sum(dim=-1, keepdim=True)


class EventsModality(nn.Module):
    """Histories of events as positions of a prompt.

    Args:
        config: features, sizes and projector.
        name: in messages.
        hidden_size: width of the language model.
    """

    def __init__(self, config: EventsConfig, *, name: str, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.projector_config = config.projector_for(hidden_size)
        self.encoder = EventEncoder(config)
        self.projector = build_projector(self.projector_config)

    def prepare(self, raw: object) -> PreparedEvents:
        """Return the last `max_events` events of a history as numbers.

        Args:
            raw: {feature: values of all events}, or a list of events {feature: value}, oldest
                first. A feature that is left out is unknown: 0. One that may have several values
                in an event takes a list of them, too.

        Raises:
            MediaError: no history, no event, a feature that the model does not have, features of
                different lengths, or a value that is none.
        """
        columns, length = self._columns(raw)
        return self._prepared(columns, range(max(0, length - self.config.max_events), length))

    def windows(self, raw: object) -> list[PreparedEvents]:
        """Return a history in pieces of `max_events`, to learn all of it; see `prepare`.

        A piece begins with the last event of the one before it, so that every event but the first
        is predicted once. A history of one event has no piece.
        """
        columns, length = self._columns(raw)
        size = self.config.max_events
        starts = range(0, length - 1, max(1, size - 1))
        return [self._prepared(columns, range(at, min(at + size, length))) for at in starts]

    def _prepared(self, columns: Mapping[str, Sequence[Any]], kept: range) -> PreparedEvents:
        categories = [
            [
                index
                for one in self.config.categorical
                for index in self._indices(one, columns[one.name][i])
            ]
            for i in kept
        ]
        numbers = [[self._number(n, columns[n][i]) for n in self.config.numeric] for i in kept]
        return PreparedEvents(
            torch.tensor(categories),
            torch.tensor(numbers, dtype=torch.float32).reshape(len(kept), -1),
        )

    def _columns(self, raw: object) -> tuple[dict[str, Sequence[Any]], int]:
        """Return the values of every feature, oldest event first, and the number of events."""
        names = [*(one.name for one in self.config.categorical), *self.config.numeric]
        if isinstance(raw, Mapping):
            given = {key: self._values(key, values) for key, values in raw.items()}
        elif isinstance(raw, Sequence) and all(isinstance(event, Mapping) for event in raw):
            keys = dict.fromkeys(key for event in raw for key in event)
            given = {key: [event.get(key) for event in raw] for key in keys}
        else:
            raise MediaError(
                f"{self.name}: expected {{feature: values}} or a list of events, got {shown(raw)}"
            )
        if odd := next((key for key in given if key not in names), None):
            raise MediaError(
                f"{self.name}: no feature is called {shown(odd)}, there are {', '.join(names)}"
            )
        lengths = {key: len(values) for key, values in given.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} {count}" for key, count in lengths.items())
            raise MediaError(f"{self.name}: the features have different lengths: {counts}")
        length = next(iter(lengths.values()), 0)
        if not length:
            raise MediaError(f"{self.name}: the history has no event, expected at least one")
        return {name: given.get(name, [None] * length) for name in names}, length

    def _values(self, key: object, values: object) -> Sequence[Any]:
        found = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
        if isinstance(found, str) or not isinstance(found, Sequence):
            raise MediaError(
                f"{self.name}: {shown(key)} must be a list with a value for each event, got "
                f"{shown(values)}"
            )
        return found

    def _indices(self, feature: CategoricalFeature, value: object) -> list[int]:
        """Return the values of a feature in one event, filled up with unknown ones."""
        found = value.tolist() if hasattr(value, "tolist") else value
        values = found if isinstance(found, list | tuple | set | frozenset) else [found]
        if feature.most == 1 and values is found:
            values = [value]  # refused as what it is
        if len(values) > feature.most:
            raise MediaError(
                f"{self.name}: {feature.name} has {len(values)} values in one event, and the model "
                f"reads {feature.most}: leave some out"
            )
        indices = [self._index(feature, one) for one in values]
        return indices + [UNKNOWN] * (feature.most - len(indices))

    def _index(self, feature: CategoricalFeature, value: object) -> int:
        if value is None:
            return UNKNOWN
        try:
            index = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # refused below
        except TypeError:
            index = -1
        if not 0 <= index < feature.size:
            raise MediaError(
                f"{self.name}: {feature.name} is {shown(value)}, expected a number from 0 "
                f"(unknown) to {feature.size - 1}"
            )
        return index

    def _number(self, feature: str, value: object) -> float:
        if value is None:
            return 0.0
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise MediaError(f"{self.name}: {feature} is {shown(value)}, expected a number")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:  # arrays of several, 10 ** 400
            raise MediaError(
                f"{self.name}: {feature} is {shown(value)}, expected a number ({error})"
            ) from error
        if not math.isfinite(number):
            raise MediaError(f"{self.name}: {feature} is {number}, expected a finite number")
        return number

    def num_tokens(self, prepared: PreparedEvents) -> int:
        """Return a position for every event handed on, or for every query of a resampler."""
        number = len(prepared.categories)
        return self.projector_config.num_queries or min(number, self.config.tokens or number)

    def blank(self) -> PreparedEvents:
        """Return a history of one unknown event, for processes that train without one."""
        return self.prepare([{self.config.categorical[0].name: UNKNOWN}])

    def output_layers(self) -> list[nn.Linear]:
        """Return the linear layers whose outputs are the features."""
        return output_layers(self.projector)

    def states(self, items: Sequence[PreparedEvents]) -> list[Float[Tensor, "_ E"]]:
        """Return the encoder's state behind every event, the histories side by side."""
        pad = nn.utils.rnn.pad_sequence  # on the right, where no event before it looks
        states = self.encoder(
            pad([item.categories for item in items], batch_first=True, padding_value=UNKNOWN),
            pad([item.numbers for item in items], batch_first=True),
        )
        return [row[: len(item.categories)] for row, item in zip(states, items, strict=True)]

    def embed(self, items: Sequence[PreparedEvents]) -> list[Float[Tensor, "_ D"]]:
        """Return the features of every history."""
        if not items:
            return []
        return self.project(self.states(items))

    def project(self, states: Sequence[Float[Tensor, "_ E"]]) -> list[Float[Tensor, "_ D"]]:
        """Return the features of histories whose states are known.

        The states behind the first events of a history are those of a history that ends there, so
        that many of them can be asked about after one pass of the encoder.
        """
        states = [state[-self.config.tokens :] for state in states]  # [-0:] is all of them
        weight = next(self.projector.parameters(), None)
        if weight is not None:
            states = [state.to(weight.device, weight.dtype) for state in states]
        lengths = [len(state) for state in states]
        if not self.projector_config.num_queries:
            return list(torch.split(self.projector(torch.cat(states)), lengths))
        found: dict[int, Tensor] = {}
        for length in set(lengths):  # a resampler takes those of one length together
            places = [i for i, other in enumerate(lengths) if other == length]
            made = self.projector(torch.stack([states[i] for i in places]))
            found.update(zip(places, made, strict=True))
        return [found[i] for i in range(len(states))]

    def next_event_loss(self, items: Sequence[PreparedEvents]) -> Float[Tensor, ""]:
        """Return the cross-entropies of the next event's categorical features, summed over them.

        The mean over all events that have one before; unknown values count nothing.

        Raises:
            MediaError: no history has a second event.
        """
        losses, count = self.next_event_losses(items)
        return torch.stack(losses).sum() / count

    def next_event_losses(
        self, items: Sequence[PreparedEvents]
    ) -> tuple[list[Float[Tensor, ""]], int]:
        """Return per categorical feature the sum over all next events, and how many those are.

        Raises:
            MediaError: no history has a second event.
        """
        count = sum(len(item.categories) - 1 for item in items)
        if not count:
            raise MediaError(f"{self.name}: no history has a second event to predict")
        before = torch.cat([state[:-1] for state in self.states(items)])
        return self.encoder.losses(before, torch.cat([i.categories[1:] for i in items])), count
