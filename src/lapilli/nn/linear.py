"""A linear layer in float32 that takes oneDNN's product; the weight stays as it lies.

torch gives float32 products to MKL, which leaves half of some CPUs unused. Which of the two is
faster is measured (quant/choose.py), never guessed.
"""

import torch
from torch import nn
from torch.nn import functional

from lapilli.shapes import Float, Tensor

FEWEST_ROWS = 16
"""Below this a product waits for its weight, whoever computes it."""


def has_onednn() -> bool:
    """Whether this build of torch has the product."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "out K"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """The same as `functional.linear`, by oneDNN; no gradients."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class OneDnnLinear(nn.Linear):
    """nn.Linear whose products of many rows are oneDNN's where no gradient is wanted."""

    @classmethod
    def of(cls, plain: nn.Linear) -> "OneDnnLinear":
        """A layer with the same parameters, not copies of them."""
        layer = cls(
            plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta"
        )
        layer.weight, layer.bias = plain.weight, plain.bias
        return layer.train(plain.training)

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """W x + b."""
        is_eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if is_eager and self._fits(x):
            return onednn_linear(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def _fits(self, x: Tensor) -> bool:
        """Many rows of float32 on a CPU."""
        return (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == "cpu"
            and x.numel() >= FEWEST_ROWS * self.in_features
        )
