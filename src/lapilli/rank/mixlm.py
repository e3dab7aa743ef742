"""MixLM's training: a ranker that reads texts teaches one that reads an encoder's vectors.

    text     query, item's text ----------------------> p            KL(label || p)
    mixed    query, item's text -> encoder -> vectors -> p, h        KL(label || p)
             + distill  KL(teacher || p)                             the text ranker's probability
             + align    (KL(p~ || p) + hidden (1 - cos(h, h~)))      the same ranker, on the text
             + text     KL(label || p~)                              what it read stays learned

Encoder and ranker are one checkpoint: the language model ranks, a declared modality of the kind
`text` encodes. Prompts are cut as a Ranker cuts them, so what is learned is what is asked. Knows
prompts and probabilities; must not know files.

Source: Guoyao Li et al. 2025 (MixLM, arXiv 2512.07846): stages II and III, and a curriculum of two
    phases. The weights that we know of it are none; those here are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final, Literal

import torch
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli.errors import ConfigError
from lapilli.generate.engine.feature_cache import content_digest
from lapilli.model import VisionLanguageModel
from lapilli.pipeline import Chat
from lapilli.pipeline.scorer import join
from lapilli.prompt.message import MediaPart
from lapilli.rank.prompt import Frame, PromptSplitter, RankTemplate
from lapilli.rank.ranker import Ranker, with_lead
from lapilli.rank.score import YesNo, label_tokens
from lapilli.shapes import Float, Tensor
from lapilli.train.data import EncodedSample
from lapilli.train.data.sampler import Order
from lapilli.train.recipe import Phase, RunRecipe
from lapilli.train.trainer.loop import number_of_steps
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.task import Loss, Plain, TrainingBatch, collate

Reads = Literal["text", "mixed"]
_FRAMES: Final = 4096  # queries whose prompts are kept


@dataclass(frozen=True, slots=True)
class RankingExample:
    """A query, the text of an item, and how well they match.

    Attributes:
        query: as people ask.
        item: the text.
        label: probability that it matches, 0 to 1: a judge's grade, or a click.
        teacher: what the text ranker says, 0 to 1; None: it was not asked.

    Raises:
        ConfigError: a probability that is none.
    """

    query: str
    item: str
    label: float
    teacher: float | None = None

    def __post_init__(self) -> None:
        for name in ("label", "teacher"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(
                    f"the {name} of the item {self.item!r} for the query {self.query!r} is {value}:"
                    " expected a probability, 0 to 1"
                )


def with_teacher(examples: Sequence[RankingExample], ranker: Ranker) -> list[RankingExample]:
    """Return the examples with the ranker's probabilities of their texts, each query read once.

    Raises:
        ConfigError: the ranker gives no probabilities: its score is YesNo() or a Head with them.
    """
    of_query: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        of_query.setdefault(example.query, []).append(place)
    found = list(examples)
    for query, places in of_query.items():
        scores = ranker.score(query, [examples[place].item for place in places])
        for place, score in zip(places, scores.tolist(), strict=True):
            found[place] = replace(examples[place], teacher=score)
    return found


CURRICULUM: Final = (
    Phase(start=0.0, distill=0.5, align=2.0),
    Phase(start=0.5, distill=2.0, align=0.5),
)
"""First the spaces are brought together, then the task is learned."""


_LABELS: Final = Phase(distill=0.0, align=0.0)


@dataclass(frozen=True, slots=True)
class RankingBatch:
    """Prompts of one micro-batch, in one order.

    Attributes:
        read: what is scored, and learns.
        text: the same with the items as texts; None where the phase does not read them.
        labels: probabilities.
        teacher: probabilities; None where the phase does not learn from them.
        phase: weights of the parts.
    """

    read: TrainingBatch
    text: TrainingBatch | None
    labels: Float[Tensor, " B"]
    teacher: Float[Tensor, " B"] | None
    phase: Phase

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the names of the examples."""
        return self.read.ids


def binary_kl(target: Float[Tensor, " B"], logits: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return KL(target || sigmoid(logits)) of two outcomes, in nats."""
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    found: Tensor = F.binary_cross_entropy_with_logits(logits, target, reduction="none") - entropy
    return found


class RankingModel(TrainedModel):
    """A ranker in training, with its encoder where it has one.

    Args:
        vlm: the model.
        tokens: ids of yes and of no.
    """

    def __init__(self, vlm: VisionLanguageModel, tokens: tuple[int, int]) -> None:
        super().__init__(vlm)
        self.register_buffer("_tokens", torch.tensor(tokens, device=vlm.device), persistent=False)

    def forward(self, batch: RankingBatch) -> Loss:  # type: ignore[override]  # a batch of its own
        """Return the loss of the batch, summed over its examples, and its parts.

        In evaluation it is KL(label || p) alone, which no phase weighs.
        """
        logits, hidden = self.read(batch.read)
        device, phase = logits.device, batch.phase
        total = binary_kl(batch.labels.to(device), logits).sum()
        if not self.training:
            return Loss(total)
        parts = {"labels": total.detach()}
        if batch.teacher is not None:
            distill = binary_kl(batch.teacher.to(device), logits).sum()
            total, parts["distill"] = total + phase.distill * distill, distill.detach()
        if batch.text is not None:
            with torch.set_grad_enabled(phase.text > 0):
                text_logits, text_hidden = self.read(batch.text)
            if phase.text:
                kept = binary_kl(batch.labels.to(device), text_logits).sum()
                total, parts["text"] = total + phase.text * kept, kept.detach()
            # The text shows where the vectors should lead, and is not led by them.
            same = binary_kl(torch.sigmoid(text_logits.detach()), logits).sum()
            apart = (1 - F.cosine_similarity(hidden, text_hidden.detach(), dim=-1)).sum()
            total = total + phase.align * (same + phase.hidden * apart)
            parts |= {"align": same.detach(), "hidden": apart.detach()}
        return Loss(total, parts)

    def read(self, batch: TrainingBatch) -> tuple[Float[Tensor, " B"], Float[Tensor, "B D"]]:
        """Return logit(yes) - logit(no) and the last hidden state of every prompt, in float32."""
        hidden = self.hidden(batch)
        ends = [lengths[0] - 1 for lengths in batch.segments]  # one prompt in a row, padded behind
        rows = torch.arange(len(ends), device=hidden.device)
        last = hidden[rows, torch.tensor(ends, device=hidden.device)]
        tokens: Tensor = self._tokens  # type: ignore[assignment]  # a buffer
        scores = self.vlm.language_model.token_logits(last, tokens).float()
        return scores[:, 0] - scores[:, 1], last.float()


@dataclass
class RankingTask:
    """Examples for a ranker; what `lapilli.train.trainer.loop.train` runs.

    What learns is what requires a gradient: `lapilli.train.stages.choose_trainable` marks it.

    Attributes:
        chat: the model, its tokenizer and its conversation template.
        examples: what is learned from.
        run: the run's section of the recipe: batch_size is in examples.
        reads: "text": the items as texts; "mixed": as vectors of the modality `encoder`.
        held_out: examples that are only scored; `eval_loss` is KL(label || p) of each.
        template: what is said, as for a Ranker.
        score: its labels are learned.
        encoder: name of the modality that makes vectors of a text.
        curriculum: phases of the mixed stage, by start.

    Raises:
        ConfigError: no examples, phases of which none is the first, or no teacher for a phase that
            learns from one.
        UnsupportedModelError: the model has no modality `encoder`.
        PromptError: a label of several tokens.
    """

    chat: Chat
    examples: Sequence[RankingExample]
    run: RunRecipe
    reads: Reads = "text"
    held_out: Sequence[RankingExample] = ()
    template: RankTemplate = field(default_factory=RankTemplate)
    score: YesNo = field(default_factory=YesNo)
    encoder: str = "item"
    curriculum: Sequence[Phase] = CURRICULUM
    model: RankingModel = field(init=False)

    def __post_init__(self) -> None:
        if not self.examples:
            raise ConfigError("a ranker learns from at least one example, found none")
        starts = [phase.start for phase in self.curriculum]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ConfigError(
                f"the phases of the curriculum start at {starts}: expected 0, and every other one "
                "later than the one before"
            )
        if self.reads == "mixed":
            self.chat.model.modality(self.encoder)
            self._check_teacher()
        self._lead, ids = label_tokens(self.score.labels, self.chat.tokenizer)
        self.model = RankingModel(self.chat.model, (ids[0], ids[1]))
        self._splitter = PromptSplitter(self.chat, self.template)
        self._frame: Callable[[str], Frame] = lru_cache(maxsize=_FRAMES)(self._closed_frame)
        self._order = Order(
            [len(self.examples)],
            batch_size=self.run.batch_size,
            micro_batches=self.run.gradient_accumulation_steps,
            seed=self.run.seed,
        )
        self._steps = number_of_steps(self, self.run)

    @property
    def num_samples(self) -> int:
        """Return the examples of one epoch."""
        return len(self.examples)

    def fingerprint(self) -> Mapping[str, Plain]:
        """Return what decides the batches and their loss."""
        curriculum = list(self.curriculum) if self.reads == "mixed" else []
        return {
            "examples": content_digest(list(self.examples)).hex(),
            "reads": self.reads,
            "template": content_digest([self.template, self.score, self.chat.template.name]).hex(),
            "curriculum": content_digest(curriculum).hex(),
            "steps of the curriculum": self._steps if len(curriculum) > 1 else 0,
            "run.seed": self.run.seed,
            "run.batch_size": self.run.batch_size,
            "run.gradient_accumulation_steps": self.run.gradient_accumulation_steps,
        }

    def names(self, step: int, micro: int) -> list[str]:
        """Return which examples a micro-batch has."""
        return [f"example {place}" for place in self._order.indices(step, micro)]

    def batch(self, step: int, micro: int) -> tuple[RankingBatch, int]:
        """Return a micro-batch and its number of examples: a function of the two numbers."""
        places = self._order.indices(step, micro)
        phase = self.phase(step)
        made = self._batch([self.examples[place] for place in places], phase, places)
        return made, len(places)

    def loss(self, batch: RankingBatch) -> Loss:
        """Return the summed loss."""
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return KL(label || p) of the examples that are held out, their mean."""
        if not self.held_out:
            return {}
        total, size = 0.0, self.run.batch_size
        for start in range(0, len(self.held_out), size):
            chosen = self.held_out[start : start + size]
            total += float(self.loss(self._batch(chosen, _LABELS)).total.detach())
        return {"eval_loss": total / len(self.held_out)}

    def phase(self, step: int) -> Phase:
        """Return the weights of a step (counted from 0)."""
        if self.reads == "text":
            return _LABELS
        done = step / self._steps
        return [phase for phase in self.curriculum if phase.start <= done][-1]

    def prompts(
        self, examples: Sequence[RankingExample], *, reads: Reads, places: Sequence[int] = ()
    ) -> TrainingBatch:
        """Return the prompts that a Ranker would score, one in each row.

        Raises:
            PromptError: a query or an item with nothing in it.
            MediaError: an item that the encoder cannot read.
            ContextTooLongError: an example that does not fit.
        """
        names = [f"example {place}" for place in places or range(len(examples))]
        pairs = zip(examples, names, strict=True)
        return collate([self._sample(example, reads, name) for example, name in pairs])

    def _check_teacher(self) -> None:
        untaught = sum(example.teacher is None for example in self.examples)
        if untaught and any(phase.distill for phase in self.curriculum):
            raise ConfigError(
                f"{untaught} of {len(self.examples)} examples have no teacher's probability, and a "
                "phase learns from it: ask with_teacher(examples, ranker), or set distill=0"
            )

    def _batch(
        self, examples: Sequence[RankingExample], phase: Phase, places: Sequence[int] = ()
    ) -> RankingBatch:
        teacher = [one.teacher for one in examples if one.teacher is not None]
        is_read = phase.align > 0 or phase.text > 0
        return RankingBatch(
            read=self.prompts(examples, reads=self.reads, places=places),
            text=self.prompts(examples, reads="text", places=places) if is_read else None,
            labels=torch.tensor([example.label for example in examples], dtype=torch.float32),
            teacher=torch.tensor(teacher) if phase.distill else None,
            phase=phase,
        )

    def _closed_frame(self, query: str) -> Frame:
        frame = self._splitter.frame(query)
        return Frame(frame.prefix, with_lead(frame.suffix, self._lead))

    def _sample(self, example: RankingExample, reads: Reads, name: str) -> EncodedSample:
        frame = self._frame(example.query)
        item = example.item if reads == "text" else MediaPart(example.item, self.encoder)
        piece = self._splitter.item(item, name)
        self._splitter.check_length(frame, piece, name)
        whole = join([frame.prefix, piece, frame.suffix])
        return EncodedSample(whole.encoded, whole.media, name)
