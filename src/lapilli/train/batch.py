"""Encoded conversations as one rectangle of tensors; knows no strings and no files.

Rows are padded on the right: under a causal mask no real position ever looks at padding, so no
attention mask is needed
and every row's positions start at 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows to learn from.

    Attributes:
        input_ids: PLACEHOLDER under spans and padding.
        loss_mask: True where a token is supervised; never under spans or padding.
        spans: places of media, in the order of `media`.
        media: encoder features, one [n_i, E] each.
        num_valid: supervised tokens.
    """

    input_ids: Int[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    spans: tuple[Span, ...]
    media: tuple[Float[Tensor, "_ E"], ...]
    num_valid: int

    @property
    def position_ids(self) -> Int[Tensor, "B T"]:
        """0, 1, 2, ... in every row."""
        rows, length = self.input_ids.shape
        return torch.arange(length).expand(rows, length)


def collate(
    prompts: Sequence[EncodedPrompt], media: Sequence[Sequence[Float[Tensor, "_ E"]]]
) -> TrainingBatch:
    """One batch of rows; `media` holds the features of each row in the order of its spans."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), PLACEHOLDER, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt.input_ids)
        mask[row, : len(prompt)] = torch.tensor(prompt.loss_mask)
    mask[:, 0] = False  # nothing predicts the first token of a row
    spans = tuple(
        Span(row, span.start, span.length, span.modality)
        for row, prompt in enumerate(prompts)
        for span in prompt.spans
    )
    features = tuple(item for row in media for item in row)
    return TrainingBatch(ids, mask, spans, features, int(mask.sum()))


def by_length(lengths: Sequence[int], pieces: int) -> list[list[int]]:
    """Row numbers in `pieces` groups of similar length, longest first.

    The micro-batches of one step: their padding shrinks, and their sum does not change.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    size = -(-len(order) // pieces)
    return [order[start : start + size] for start in range(0, len(order), size)]
