"""Next item: a language model reads the vectors of items as its sequence, and says what follows.

    catalogue  --modality, one position each--> vectors [N, D]
    history    3, 7, 2 --their vectors--> language model --> a state behind every item
    score      cosine(state, vector): the last state says what comes next
    loss       cross entropy over the items of the batch and drawn ones, of cosine / temperature

Items are texts through an encoder of their own, or vectors of another one; both models may learn
at once. Knows items, histories and vectors; must not know prompts or files.

Source: Junyi Chen et al. 2024 (HLLM, arXiv 2409.12740): an item model, a user model that reads its
    vectors, and noise-contrastive estimation against other items.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli.config.reader import shown
from lapilli.errors import ConfigError, MediaError, PromptError
from lapilli.generate.engine.feature_cache import content_digest
from lapilli.generate.reference import lock_of
from lapilli.lm import LanguageModel
from lapilli.modality import Modality
from lapilli.model import VisionLanguageModel
from lapilli.nn.linear import rounded
from lapilli.pipeline import Chat
from lapilli.shapes import Float, Tensor
from lapilli.train.data.sampler import OrderByLength
from lapilli.train.recipe import MAX_ITEMS, TEMPERATURE, RunRecipe
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss, Plain

BATCH: Final = 64
_LEADING: Final = 10  # places that count for eval_recall


def item_vectors(modality: Modality, items: Sequence[Any]) -> Float[Tensor, "N D"]:
    """Return the vector of every prepared item.

    Raises:
        ConfigError: an item of several positions.
    """
    counts = {modality.num_tokens(item) for item in items}
    if counts - {1}:
        raise ConfigError(
            f"an item of the modality {modality.name!r} has {max(counts)} positions, and in a "
            "history it has one: declare tokens = 1, give one vector an item, and no resampler"
        )
    return torch.cat(modality.embed(items))


def states_of(
    language_model: LanguageModel,
    vectors: Float[Tensor, "N D"],
    histories: Sequence[Sequence[int]],
) -> list[Float[Tensor, "_ D"]]:
    """Return the state behind every item of every history, the histories side by side."""
    longest = rounded(max(map(len, histories)))
    places = torch.zeros(len(histories), longest, dtype=torch.long)
    for row, history in enumerate(histories):
        places[row, : len(history)] = torch.tensor(history)
    read = vectors[places.to(vectors.device)]  # padded behind, where no item before it looks
    positions = torch.arange(longest, device=read.device).expand(len(read), -1)
    states = language_model.forward(read, position_ids=positions)
    return [row[: len(history)] for row, history in zip(states, histories, strict=True)]


def cosines(states: Float[Tensor, "M D"], vectors: Float[Tensor, "N D"]) -> Float[Tensor, "M N"]:
    """Return the cosine of every state and every vector, in float32."""
    return F.normalize(states.float(), dim=-1) @ F.normalize(vectors.float(), dim=-1).T


class NextItemScorer:
    """Scores the items of a whole catalogue for users.

    Args:
        model: what `lapilli.load` returns.
        modality: name of the one that makes vectors of items.
        batch_size: items, or histories, of one pass.
        max_items: of a history; the last ones are read.

    Raises:
        UnsupportedModelError: the model has no such modality.
        ConfigError: limits that leave nothing.
    """

    def __init__(
        self,
        model: Chat,
        modality: str = "item",
        *,
        batch_size: int = BATCH,
        max_items: int = MAX_ITEMS,
    ) -> None:
        if batch_size < 1 or max_items < 1:
            raise ConfigError(
                f"batch_size is {batch_size} and max_items {max_items}: expected at least 1"
            )
        self._model = model.model
        self._modality = model.model.modality(modality)
        self._batch_size, self._max_items = batch_size, max_items

    @torch.inference_mode()
    def encode(self, catalogue: Iterable[object]) -> Float[Tensor, "N D"]:
        """Return the vectors of items, float32 on the CPU; a store may keep them.

        Raises:
            MediaError: an item that the modality cannot read, or no items.
            ConfigError: an item of several positions.
        """
        found: list[Tensor] = []
        stream = iter(catalogue)
        while chunk := list(islice(stream, self._batch_size)):
            prepared = [self._modality.prepare(item) for item in chunk]
            with lock_of(self._model.language_model).turn:
                found.append(item_vectors(self._modality, prepared).float().cpu())
        if not found:
            raise MediaError(f"{self._modality.name}: the catalogue is empty")
        return torch.cat(found)

    @torch.inference_mode()
    def score(
        self, histories: Sequence[Sequence[int]], items: Float[Tensor, "..."]
    ) -> Float[Tensor, "U N"]:
        """Return the cosine of what every user wants next and every item, float32 on the CPU.

        Args:
            histories: of every user the items' places in `items`, oldest first.
            items: vectors [N, D] of `encode`, or [N, 1, D] of a store.

        Raises:
            PromptError: a history without items, or with a place that no item has.
            MediaError: vectors of another width.
        """
        items = self._checked(items)
        for number, history in enumerate(histories):
            check_history(history, len(items), f"history {number}")
        found = torch.empty(len(histories), len(items))
        order = sorted(range(len(histories)), key=lambda at: -len(histories[at]))
        device = self._model.device
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            kept = [list(histories[at])[-self._max_items :] for at in chosen]
            used, local = _renumbered(kept)
            with lock_of(self._model.language_model).turn:
                vectors = items[used].to(device, _dtype(self._model))
                states = states_of(self._model.language_model, vectors, local)
                last = torch.stack([state[-1] for state in states]).float().cpu()
            found[chosen] = cosines(last, items)
        return found

    def _checked(self, items: Tensor) -> Float[Tensor, "N D"]:
        width = self._model.language_model.config.hidden_size
        flat = items.squeeze(1) if items.ndim == 3 and items.shape[1] == 1 else items
        if flat.ndim != 2 or flat.shape[1] != width or not len(flat):
            raise MediaError(
                f"items: expected vectors [N, {width}] or [N, 1, {width}], as wide as the language "
                f"model, got {list(items.shape)}"
            )
        return flat.detach().float().cpu()


def check_history(history: Sequence[int], number: int, name: str, *, least: int = 1) -> None:
    """Refuse a history that names no items of the catalogue.

    Raises:
        PromptError: fewer than `least` items, or a place that the catalogue does not have.
    """
    if len(history) < least:
        raise PromptError(f"{name} has {len(history)} items, expected at least {least}")
    odd = next((one for one in history if not 0 <= one < number), None)
    if odd is not None:
        raise PromptError(
            f"{name} has the item {shown(odd)}: the catalogue has places from 0 to {number - 1}"
        )


def _renumbered(
    histories: Sequence[Sequence[int]], more: Iterable[int] = ()
) -> tuple[list[int], list[list[int]]]:
    """Return the items of histories, each once and in order, and the histories in their places."""
    used = sorted({one for history in histories for one in history}.union(more))
    place = {one: at for at, one in enumerate(used)}
    return used, [[place[one] for one in history] for history in histories]


def _dtype(model: VisionLanguageModel) -> torch.dtype:
    """Return the number format that the language model reads."""
    return model.language_model.embed(torch.zeros(1, dtype=torch.long, device=model.device)).dtype


@dataclass(frozen=True, slots=True)
class NextItemBatch:
    """Histories and what may follow.

    Attributes:
        items: prepared, each once.
        histories: places in `items`; every item but the first is predicted.
        ids: names of the histories.
    """

    items: tuple[Any, ...]
    histories: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...] = ()


class NextItemModel(TrainedModel):
    """An encoder of items and the language model that reads what it makes, in training.

    Args:
        vlm: the model.
        modality: name of the one that makes vectors of items.
        temperature: that cosines are divided by.
    """

    def __init__(self, vlm: VisionLanguageModel, modality: str, temperature: float) -> None:
        super().__init__(vlm)
        self._name, self._temperature = modality, temperature

    def forward(self, batch: NextItemBatch) -> Loss:  # type: ignore[override]  # a batch of its own
        """Return the summed loss of all items that follow, and how many were the nearest."""
        vectors = item_vectors(self.vlm.modality(self._name), batch.items)
        language_model = self.vlm.language_model
        states = states_of(language_model, vectors, [one[:-1] for one in batch.histories])
        following = [place for one in batch.histories for place in one[1:]]
        targets = torch.tensor(following, device=vectors.device)
        logits = cosines(torch.cat(states), vectors) / self._temperature
        right = (logits.detach().argmax(dim=-1) == targets).sum()
        return Loss(F.cross_entropy(logits, targets, reduction="sum"), {"right": right})


@dataclass
class NextItemTask:
    """Histories over a catalogue; what `lapilli.train.trainer.loop.train` runs.

    What learns is what requires a gradient: `lapilli.train.stages.choose_trainable` marks it.

    Attributes:
        chat: the model.
        catalogue: items as the modality's `prepare` takes them.
        histories: of every user the items' places in the catalogue, oldest first; long ones are
            learned in pieces.
        run: the run's section of the recipe: batch_size is in histories.
        modality: name of the one that makes vectors of items.
        negatives: items that are drawn for every micro-batch, beside those of its histories.
        max_items: that the language model reads of a history.
        temperature: that cosines are divided by.
        held_out: histories whose last item is to be found in the whole catalogue: `eval_loss` is
            its cross entropy, `eval_recall` the share of those among the first ten.

    Raises:
        ConfigError: no catalogue, no histories, a limit that leaves nothing, or something held out
            from a model in pieces.
        PromptError: a history of fewer than two items, or with one that the catalogue lacks.
        UnsupportedModelError: the model has no such modality.
    """

    chat: Chat
    catalogue: Sequence[object] | Tensor
    histories: Sequence[Sequence[int]]
    run: RunRecipe
    modality: str = "item"
    negatives: int = 0
    max_items: int = MAX_ITEMS
    temperature: float = TEMPERATURE
    held_out: Sequence[Sequence[int]] = ()
    model: NextItemModel = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        self._modality = self.chat.model.modality(self.modality)
        self.model = NextItemModel(self.chat.model, self.modality, self.temperature)
        self._pieces = [
            (number, list(history[at : at + self.max_items + 1]))
            for number, history in enumerate(self.histories)
            for at in range(0, len(history) - 1, self.max_items)
        ]
        lengths = [len(piece) for _, piece in self._pieces]
        self._order = OrderByLength(lengths, self.run, stream=47)

    @property
    def num_samples(self) -> int:
        """Return the pieces of histories of one epoch."""
        return len(self._pieces)

    def fingerprint(self) -> Mapping[str, Plain]:
        """Return what decides the batches and their loss."""
        prepared = [self._modality.prepare(item) for item in self.catalogue]
        return {
            "catalogue": content_digest(prepared).hex(),
            "histories": content_digest([list(map(int, one)) for one in self.histories]).hex(),
            "modality": self.modality,
            "negatives": self.negatives,
            "max_items": self.max_items,
            "temperature": self.temperature,
            "run.seed": self.run.seed,
            "run.batch_size": self.run.batch_size,
            "run.gradient_accumulation_steps": self.run.gradient_accumulation_steps,
        }

    def batch(self, step: int, micro: int) -> tuple[NextItemBatch, int]:
        """Return histories of similar length and how many items they predict.

        Histories that fill no micro-batch of an epoch wait for another one.
        """
        chosen = [self._pieces[i] for i in self._order.indices(step, micro)]
        rng = np.random.default_rng([self.run.seed, step, micro, 53])
        drawn = rng.integers(len(self.catalogue), size=self.negatives).tolist()
        used, local = _renumbered([piece for _, piece in chosen], drawn)
        made = NextItemBatch(
            items=tuple(self._modality.prepare(self.catalogue[one]) for one in used),
            histories=tuple(map(tuple, local)),
            ids=tuple(f"history {place}" for place, _ in chosen),
        )
        return made, sum(len(piece) - 1 for _, piece in chosen)

    def loss(self, batch: NextItemBatch) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return how well the last items of what is held out are found in the whole catalogue."""
        if not self.held_out:
            return {}
        scorer = NextItemScorer(
            self.chat, self.modality, batch_size=self.run.batch_size, max_items=self.max_items
        )
        vectors, size = scorer.encode(self.catalogue), self.run.batch_size
        loss = found = 0.0
        for start in range(0, len(self.held_out), size):
            chosen = self.held_out[start : start + size]
            scores = scorer.score([one[:-1] for one in chosen], vectors)
            targets = torch.tensor([int(one[-1]) for one in chosen])
            loss += float(F.cross_entropy(scores / self.temperature, targets, reduction="sum"))
            before = (scores > scores.gather(1, targets[:, None])).sum(dim=-1)
            found += int((before < _LEADING).sum())
        return {
            "eval_loss": loss / len(self.held_out),
            "eval_recall": found / len(self.held_out),
        }

    def _check(self) -> None:
        if not len(self.catalogue) or not self.histories:
            raise ConfigError(
                f"{len(self.catalogue)} items and {len(self.histories)} histories: expected at "
                "least one of each"
            )
        if self.max_items < 1 or self.negatives < 0 or not self.temperature > 0:
            raise ConfigError(
                f"max_items is {self.max_items}, negatives {self.negatives}, temperature "
                f"{self.temperature}: expected at least 1, at least 0, and above 0"
            )
        if self.held_out and self.run.sharding == "fsdp":
            raise ConfigError(
                "held-out histories are scored against the whole catalogue, which takes a whole "
                'model, and run.sharding is "fsdp": leave held_out out, or set run.sharding = "ddp"'
            )
        for name, histories in (("history", self.histories), ("held-out history", self.held_out)):
            for number, history in enumerate(histories):
                check_history(history, len(self.catalogue), f"{name} {number}", least=2)
