"""Normalisation layers; knows no model family."""

import torch
from torch import nn

from lapilli.kernels.fused import rms_norm
from lapilli.shapes import Float, Tensor


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned gain.

    The statistic is taken in float32 whatever the dtype, and the result goes back to that dtype
    before the gain: the order of the Llama reference, visible in the last bits of bfloat16.

    Source: Zhang and Sennrich 2019; Hugging Face LlamaRMSNorm.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The last axis scaled to a root mean square of one, times the gain."""
        return rms_norm(x, self.weight, self.eps)
