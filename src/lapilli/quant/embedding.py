"""A vocabulary table that stays in the number format of its file."""

import torch
from torch import nn
from torch.nn import functional

from lapilli.shapes import Float, Int, Tensor


class StoredEmbedding(nn.Module):
    """Looks up rows of a float16 or bfloat16 table and hands them out in another format.

    Only a few rows of the table are ever read, so it may stay a view of its file: half the memory,
    and exactly the numbers that a converted table would give.

    Attributes:
        dtype: of what comes out; the kernels of packed layers compute in float32.
    """

    weight: Tensor
    dtype = torch.float32

    def __init__(self, weight: Float[Tensor, "V D"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Vectors of token ids."""
        return functional.embedding(ids, self.weight).to(self.dtype)
