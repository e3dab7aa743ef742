"""What travels between the prompt and the language model: rows of vectors, padded on the left."""

from dataclasses import dataclass

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
