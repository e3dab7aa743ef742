"""Fusion of media into text: the features of every item over its own span, counted before any copy.

Functions of tensors and spans alone, and the batch of rows that comes of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from lapilli.errors import FusionError
from lapilli.prompt.encode import Span
from lapilli.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class FusedBatch:
    """Rows of text and media vectors, ready for the language model.

    Rows end together: padding stands on the left, so that the next token of every row has the
    same index. Positions are counted without padding.

    Attributes:
        inputs_embeds: vectors of all positions.
        attention_mask: False for padding.
        position_ids: 0, 1, ... from the first real position of each row; 0 under padding.
    """

    inputs_embeds: Float[Tensor, "B T D"]
    attention_mask: Bool[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]


def fuse(
    text: Float[Tensor, "B T D"], features: Sequence[Float[Tensor, "_ _"]], spans: Sequence[Span]
) -> Float[Tensor, "B T D"]:
    """Write every item's features over its span in the text embeddings.

    Args:
        text: embeddings of all positions; values under a span are ignored.
        features: one [n_i, D] tensor per span, in the order of `spans`.
        spans: where each item goes.

    Raises:
        FusionError: the number of items, an item's length or its width differs from its span, or
            a span leaves its row or covers another one.

    Source: LLaVA (arXiv 2304.08485) section 4.1; stands for the split-and-concatenate loop of
    prepare_inputs_labels_for_multimodal.
    """
    _check(text, features, spans)
    if not spans:
        return text
    rows = [span.row for span in spans for _ in range(span.length)]
    columns = [span.start + i for span in spans for i in range(span.length)]
    index = torch.tensor([rows, columns], device=text.device)  # [2, M]
    values = torch.cat([item.to(text.device, text.dtype) for item in features])
    return text.index_put((index[0], index[1]), values)


def _check(text: Tensor, features: Sequence[Tensor], spans: Sequence[Span]) -> None:
    if len(features) != len(spans):
        raise FusionError(f"{len(spans)} spans in the prompt but {len(features)} media items")
    batch, length, width = text.shape
    for i, (item, span) in enumerate(zip(features, spans, strict=True)):
        where = f"item {i} (row {span.row}, position {span.start})"
        if tuple(item.shape) != (span.length, width):
            raise FusionError(
                f"{where}: the span has {span.length} positions of width {width}, "
                f"the features are {list(item.shape)}"
            )
        if not (0 <= span.row < batch and 0 <= span.start <= length - span.length):
            raise FusionError(
                f"{where}: a span of {span.length} positions does not lie inside "
                f"{batch} rows of {length} positions"
            )
    ordered = sorted(spans, key=lambda span: (span.row, span.start))
    for before, after in pairwise(ordered):
        if before.row == after.row and before.start + before.length > after.start:
            raise FusionError(
                f"row {after.row}: the span at position {after.start} begins inside the span of "
                f"{before.length} positions at {before.start}"
            )
