"""Distillation: a student learns to answer as a teacher does; knows batches and models, no files.

    one conversation --student's encoder--> 16 positions of the picture, text --> logits [M, V]
                     --teacher's encoder--> 64 positions of the picture, text --> logits [M, V]

The i-th supervised token of one is the i-th of the other: spans may differ in length, so teacher
and student may differ in tower, resolution, projector, width and depth. Template and vocabulary are
the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.errors import ConfigError, PromptError
from lapilli.model import VisionLanguageModel
from lapilli.prompt.encode import EncodedPrompt
from lapilli.shapes import Float, Int, Tensor
from lapilli.train.data import EncodedSample, Sample, SampleEncoder
from lapilli.train.recipe import DistillRecipe, NoiseRecipe, Recipe
from lapilli.train.trainer.model import TrainedModel, supervised
from lapilli.train.trainer.task import Loss, TrainingBatch, collate

_MAP_SEED: Final = 41


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """Sums of the loss and its parts over M positions.

    Attributes:
        total: what is minimised: (1 - weight) answers + weight imitation + hidden_weight hidden.
        answers: cross entropy of the targets.
        imitation: T^2 KL(teacher || student) of the distributions at temperature T.
        hidden: 1 - cosine of the hidden states; 0 without them.
    """

    total: Float[Tensor, ""]
    answers: Float[Tensor, ""]
    imitation: Float[Tensor, ""]
    hidden: Float[Tensor, ""]


def distillation_loss(
    student_logits: Float[Tensor, "M V"],
    teacher_logits: Float[Tensor, "M V"],
    targets: Int[Tensor, " M"],
    *,
    temperature: float = 1.0,
    weight: float = 0.5,
    hidden: tuple[Float[Tensor, "M W"], Float[Tensor, "M W"]] | None = None,
    hidden_weight: float = 0.0,
) -> DistillationLoss:
    """Return how far the student is from the teacher and from the data.

    Computed in float32, or in float64 where the tensors are. No gradient goes to the teacher's.

    Args:
        student_logits: at M positions.
        teacher_logits: at the same M.
        targets: what the data has there.
        temperature: both distributions are softmax(logits / temperature).
        weight: of the teacher; 1 - weight is of the data.
        hidden: states of student and teacher at the same positions, equally wide.
        hidden_weight: of their distance.

    Source: Hinton et al. 2015 (arXiv 1503.02531) section 2: T^2 keeps the size of the gradients as
        the temperature changes. The cosine between last hidden states: MixLM (arXiv 2512.07846).
    """
    student, teacher = _wide(student_logits), _wide(teacher_logits).detach()
    answers = F.cross_entropy(student, targets, reduction="sum")
    imitation = temperature**2 * F.kl_div(
        torch.log_softmax(student / temperature, dim=-1),
        torch.log_softmax(teacher / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    distance = answers.new_zeros(())
    if hidden is not None:
        ours, theirs = (_wide(states) for states in hidden)
        distance = (1 - F.cosine_similarity(ours, theirs.detach(), dim=-1)).sum()
    total = (1 - weight) * answers + weight * imitation + hidden_weight * distance
    return DistillationLoss(total, answers, imitation, distance)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True, slots=True)
class DistillationSample(EncodedSample):
    """A student's encoded sample, and the teacher's of the same sample."""

    teacher: EncodedSample | None = None


class PairEncoder:
    """An encoder of samples for student and teacher; stands where a SampleEncoder stands.

    Args:
        student: cuts to the length of the run.
        teacher: cuts nothing; what it encodes ends with the last token that the student's has
            supervised.
    """

    def __init__(self, student: SampleEncoder, teacher: SampleEncoder) -> None:
        self._student, self._teacher = student, teacher

    def encode(self, sample: Sample) -> DistillationSample:
        """Return the student's sample with the teacher's beside it.

        Raises:
            DataError: see `SampleEncoder.encode`; or the two do not supervise the same tokens.
        """
        own, other = self._student.encode(sample), self._teacher.encode(sample)
        with sample.named_in_errors():
            prompt = matched(own.prompt, other.prompt)
        values = {field.name: getattr(own, field.name) for field in fields(EncodedSample)}
        theirs = EncodedSample(prompt, other.media[: len(prompt.spans)], own.id)
        return DistillationSample(**values, teacher=theirs)


def matched(student: EncodedPrompt, teacher: EncodedPrompt) -> EncodedPrompt:
    """Return the teacher's prompt up to the last token that the student's supervises.

    Raises:
        PromptError: the teacher supervises fewer tokens, or others.
    """
    ours, _ = _supervised(student)
    theirs, places = _supervised(teacher)
    for number, token in enumerate(ours):
        if number >= len(theirs) or theirs[number] != token:
            found = theirs[number] if number < len(theirs) else "missing"
            raise PromptError(
                f"supervised token {number} of {len(ours)} is {token} in the student's row and "
                f"{found} in the teacher's: both need the same template and vocabulary"
            )
    places = places[: len(ours)]
    end = places[-1] + 1
    spans = tuple(span for span in teacher.spans if span.start + span.length <= end)
    return EncodedPrompt(teacher.input_ids[:end], teacher.loss_mask[:end], spans)


def _supervised(prompt: EncodedPrompt) -> tuple[list[int], list[int]]:
    """Return the supervised tokens and their places; nothing predicts the first."""
    places = [i for i, counts in enumerate(prompt.loss_mask) if counts and i]
    return [prompt.input_ids[i] for i in places], places


@dataclass(frozen=True, slots=True)
class DistillationBatch(TrainingBatch):
    """The student's batch, and the teacher's with a sequence per sample, in the same order."""

    teacher: TrainingBatch | None = None


def with_teacher(batch: TrainingBatch, samples: Sequence[EncodedSample]) -> TrainingBatch:
    """Return a DistillationBatch where all samples have a teacher's, else the batch as it is.

    The samples are in the order in which they lie in the batch.
    """
    pairs = [one for one in samples if isinstance(one, DistillationSample)]
    theirs = [pair.teacher for pair in pairs if pair.teacher is not None]
    if len(theirs) < len(samples):
        return batch
    values = {field.name: getattr(batch, field.name) for field in fields(TrainingBatch)}
    return DistillationBatch(**values, teacher=collate(theirs))


class Teacher:
    """A model that is asked and never changes; no module, so that nobody trains or saves it."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = TrainedModel(model.requires_grad_(False)).eval()

    @property
    def width(self) -> int:
        """Return the width of its hidden states."""
        return self._model.vlm.language_model.config.hidden_size

    @torch.no_grad()
    def answer(
        self, batch: TrainingBatch, device: torch.device
    ) -> tuple[Float[Tensor, "M V"], Float[Tensor, "M D"]]:
        """Return logits and last hidden states where the batch supervises."""
        self._model.to(device)
        where, _ = supervised(batch.input_ids.to(device), batch.loss_mask.to(device))
        hidden = self._model.hidden(batch)[where]
        return self._model.logits(hidden), hidden


class DistilledModel(TrainedModel):
    """A student in training; without a teacher's batch, and in evaluation, a plain TrainedModel."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        teacher: Teacher,
        distill: DistillRecipe,
        *,
        noise: NoiseRecipe | None = None,
        z_loss: float = 0.0,
        compiles: bool = False,
    ) -> None:
        super().__init__(vlm, noise=noise, z_loss=z_loss, compiles=compiles)
        self._teacher, self._distill = teacher, distill
        self.hidden_map: nn.Linear | None = None
        width = vlm.language_model.config.hidden_size
        if distill.hidden_weight and width != teacher.width:
            self.hidden_map = nn.Linear(width, teacher.width, bias=False, device=vlm.device)
            generator = torch.Generator().manual_seed(_MAP_SEED)
            fresh = torch.randn(teacher.width, width, generator=generator) * width**-0.5
            with torch.no_grad():
                self.hidden_map.weight.copy_(fresh)

    def loss_of(
        self, hidden: Float[Tensor, "M D"], targets: Int[Tensor, " M"], batch: TrainingBatch
    ) -> Loss:
        """Return the summed loss of M positions that predict M tokens."""
        if not self.training or not isinstance(batch, DistillationBatch) or batch.teacher is None:
            return super().loss_of(hidden, targets, batch)
        logits = self.logits(hidden)
        teacher_logits, teacher_hidden = self._teacher.answer(batch.teacher, hidden.device)
        states = None
        if self._distill.hidden_weight:
            ours = hidden if self.hidden_map is None else self.hidden_map(hidden)
            states = (ours, teacher_hidden)
        found = distillation_loss(
            logits,
            teacher_logits,
            targets,
            temperature=self._distill.temperature,
            weight=self._distill.weight,
            hidden=states,
            hidden_weight=self._distill.hidden_weight,
        )
        parts = {"answers": found.answers.detach(), "imitation": found.imitation.detach()}
        if states is not None:
            parts["hidden"] = found.hidden.detach()
        return self.with_z_loss(Loss(found.total, parts), logits)


def load_teacher(recipe: Recipe, student: Loaded) -> Loaded | None:
    """Load the teacher that the recipe names on the CPU; None where it names none.

    Raises:
        ConfigError: its vocabulary is not the student's.
        CheckpointError: it cannot be read.
    """
    if recipe.distill is None:
        return None
    dtype = "bfloat16" if recipe.run.precision == "bfloat16" else "float32"
    teacher = load_checkpoint(recipe.distill.teacher, device="cpu", dtype=dtype)
    check_vocabulary(student, teacher)
    return teacher


def check_vocabulary(student: Loaded, teacher: Loaded) -> None:
    """Check that both speak about the same tokens.

    Raises:
        ConfigError: they do not; the message names the first difference.
    """
    ours, theirs = student.tokenizer, teacher.tokenizer
    rows = (student.config.text.vocab_size, teacher.config.text.vocab_size)
    reason = ""
    if ours.vocab_size != theirs.vocab_size:
        reason = f"{ours.vocab_size} tokens, the teacher {theirs.vocab_size}"
    elif rows[0] != rows[1]:
        reason = f"logits for {rows[0]} tokens, the teacher for {rows[1]}"
    else:
        pairs = ((ours.id_to_token(i), theirs.id_to_token(i)) for i in range(ours.vocab_size))
        number, pair = next(((i, p) for i, p in enumerate(pairs) if p[0] != p[1]), (0, ("", "")))
        if pair[0] != pair[1]:
            reason = f"{pair[0]!r} as token {number}, the teacher {pair[1]!r}"
    if reason:
        raise ConfigError(
            f"distill.teacher {teacher.path} has another vocabulary: the student has {reason}. "
            "Imitation compares probabilities token by token, so take a teacher of the same family"
        )
