"""Normalisation layers."""

import torch
from torch import nn

from lapilli.kernels.fused import rms_norm
from lapilli.shapes import Float, Tensor


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned gain.

    The statistic is taken in float32 whatever the dtype, and the result goes back to that dtype
    before the gain: the order of the Llama reference, visible in the last bits of bfloat16.

    With an offset the gain is offset + weight and multiplies in float32, as in Gemma's models.

    Source: Zhang and Sennrich 2019; Hugging Face LlamaRMSNorm, Gemma2RMSNorm.
    """

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return the last axis scaled to a root mean square of one, times the gain."""
        return rms_norm(x, self.weight, self.eps, self.offset)
