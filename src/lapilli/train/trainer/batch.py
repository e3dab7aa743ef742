"""Collation and sequence packing: encoded samples as one rectangle of tensors.

    collate         [sample], [sample], ...         one sample in a sequence, padded on the right
    collate_packed  [sample, sample], [sample]      several samples, one after the other

Padding stands on the right: under a causal mask no real position ever looks at it, so no attention
mask is needed. Positions start at 0 in every sample. Lengths are `rounded`: batches of ever new
lengths would grow the memory of a run without end. Knows no strings and no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from lapilli.errors import ConfigError
from lapilli.nn.linear import rounded
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.shapes import Bool, Int, Tensor


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
