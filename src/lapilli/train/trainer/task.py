"""Task of the trainer: a model and its batches, their loss, the state of a run and its errors.

    collate         [sample], [sample], ...         one sample in a sequence, padded on the right
    collate_packed  [sample, sample], [sample]      several samples, one after the other

Padding stands on the right: under a causal mask no real position ever looks at it, so no attention
mask is needed. Positions start at 0 in every sample. Lengths are `rounded`: batches of ever new
lengths would grow the memory of a run without end. Knows no strings and no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lapilli.errors import ConfigError, LapilliError
from lapilli.nn.linear import rounded
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.shapes import Bool, Int, Tensor
from lapilli.train.trainer.optim import Average

Plain = str | int | float | bool
Record = Mapping[str, int | float]
"""What the log says of one step."""


class TrainingError(LapilliError, RuntimeError):
    """A run that cannot go on."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one micro-batch: a sum over what counts, and parts of it for the log.

    Attributes:
        total: what is differentiated.
        parts: sums of the same kind; a tensor is read when the step is over, so that no
            micro-batch waits for the device.
    """

    total: torch.Tensor
    parts: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A model and what it is trained on.

    A task may have more, which the loop uses where it is there:
        num_samples: samples (or packed sequences) of one epoch, for a run that counts epochs.
        fingerprint(): what decides its batches and what its weights mean, by the recipe's names; a
            state of another run is refused.
        names(step, micro): how messages name the samples of a micro-batch; no media are opened.
    and so may its batches:
        ids: names of its samples.
        skipped: why samples that others stand in for could not be read.
    """

    @property
    def model(self) -> nn.Module:
        """Return the model; its trainable parameters are those that require a gradient."""
        ...

    def batch(self, step: int, micro: int) -> tuple[Any, int]:
        """Return a micro-batch and how many supervised things it has.

        A function of the two numbers and of nothing else: it may be called in another process,
        ahead of time, or again after a kill.
        """
        ...

    def loss(self, batch: Any) -> Loss:  # noqa: ANN401  the task's own type
        """Return the summed loss."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Return metrics on held-out data; the lowest `eval_loss` decides what is best."""
        ...


@dataclass(frozen=True, slots=True)
class Best:
    """The evaluation with the lowest loss so far."""

    step: int
    eval_loss: float


@dataclass(slots=True)
class RunState:
    """The state of a run; everything else is a function of its fingerprint and the step.

    Attributes:
        skipped: samples so far that could not be read.
        fingerprint: what makes it another run, by the recipe's names; None: its task does not say.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    step: int = 0
    skipped: int = 0
    best: Best | None = None
    fingerprint: Mapping[str, Plain] | None = None

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """Return the weights that the run changes, by parameter name."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}


@runtime_checkable
class EncodedLike(Protocol):
    """An encoded conversation and its media in the order of its spans, as EncodedSample is."""

    @property
    def prompt(self) -> EncodedPrompt:
        """Return ids, loss mask and spans."""
        ...

    @property
    def media(self) -> Sequence[Any]:
        """Return what the modality prepared, or features [n, E] that a tower made earlier."""
        ...

    @property
    def id(self) -> str:
        """Return the sample's name in its data."""
        ...

    @property
    def skipped(self) -> Sequence[str]:
        """Return why the samples that this one stands in for could not be read."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """A micro-batch of token sequences.

    Attributes:
        input_ids: PLACEHOLDER under spans and padding.
        loss_mask: True where a token is supervised; never under spans or padding, nor at the first
            position of a sample, which nothing predicts.
        position_ids: 0, 1, 2, ... in every sample, 0 in the padding after the last.
        spans: places of media, in the order of `media`.
        media: what the modalities prepared, or encoder features [n, E].
        segments: per sequence the lengths of its samples, one after the other.
        num_valid: supervised tokens.
        ids: names of the samples, sequence after sequence.
        skipped: why other samples, which these stand in for, could not be read.
        ends: of every span the end of its sample in the sequence; (): samples are sequences.
    """

    input_ids: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    spans: tuple[Span, ...]
    media: tuple[Any, ...]
    segments: tuple[tuple[int, ...], ...]
    num_valid: int
    ids: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()

    @property
    def is_packed(self) -> bool:
        """Return whether any sequence holds several samples."""
        return any(len(lengths) > 1 for lengths in self.segments)


def collate(samples: Sequence[EncodedLike]) -> TrainingBatch:
    """Return a batch with one sample in each sequence."""
    return collate_packed([[sample] for sample in samples])


def collate_packed(bins: Sequence[Sequence[EncodedLike]]) -> TrainingBatch:
    """Return a batch with a sequence for every bin, the samples of a bin one after the other."""
    segments = tuple(tuple(len(sample.prompt) for sample in samples) for samples in bins)
    shape = len(bins), rounded(max(map(sum, segments)))
    ids = torch.full(shape, PLACEHOLDER, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(shape, dtype=torch.long)
    spans: list[Span] = []
    ends: list[int] = []
    media: list[Any] = []
    for row, samples in enumerate(bins):
        start = 0
        for sample in samples:
            prompt, end = sample.prompt, start + len(sample.prompt)
            ids[row, start:end] = torch.tensor(prompt.input_ids)
            mask[row, start:end] = torch.tensor(prompt.loss_mask)
            mask[row, start] = False
            positions[row, start:end] = torch.arange(len(prompt))
            spans += [Span(row, start + s.start, s.length, s.modality) for s in prompt.spans]
            ends += [end] * len(prompt.spans)
            media += sample.media
            start = end
    return TrainingBatch(
        input_ids=ids,
        loss_mask=mask,
        position_ids=positions,
        spans=tuple(spans),
        media=tuple(media),
        segments=segments,
        num_valid=int(mask.sum()),
        ids=tuple(sample.id for samples in bins for sample in samples),
        skipped=tuple(why for samples in bins for sample in samples for why in sample.skipped),
        ends=tuple(ends),
    )


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return the numbers of the samples of each bin, every bin at most `room` positions long.

    The longest sample that is left goes into the first bin that has room for it, which takes at
    most 11 / 9 of the fewest bins possible, and one more.

    Raises:
        ConfigError: a sample is longer than a bin.

    Source: Johnson 1973, first-fit decreasing.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[sample]
        if length > room:
            raise ConfigError(
                f"a sample of {length} positions does not fit into a row of {room}: raise "
                "data.max_length, or let rows be cut to it"
            )
        at = next((i for i, free in enumerate(left) if free >= length), None)
        if at is None:
            bins.append([])
            left.append(room)
            at = len(bins) - 1
        bins[at].append(sample)
        left[at] -= length
    return bins
