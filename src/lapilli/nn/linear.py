"""Linear layers on a CPU: one of floats that takes the faster product, and several in one call.

1 to 4 rows    kernels/dense.py: the weight is read once, as fast as memory gives it
more           float32 by oneDNN where that was measured to be faster (quant/choose.py)
the rest       torch: it gives float32 to MKL, which leaves half of some CPUs unused
"""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional

from lapilli.kernels.dense import dense, is_dense_native
from lapilli.kernels.linear import PackedLinear, linears
from lapilli.nn.onednn import learned_product, onednn_linear
from lapilli.shapes import Float, Tensor

FEW = 4
"""Rows up to which a product waits for its weight, whoever computes it."""


class FloatLinear(nn.Linear):
    """nn.Linear in float32 or bfloat16 on a CPU, faster.

    Attributes:
        by_onednn: many rows of float32 go to oneDNN.
    """

    by_onednn = False

    @classmethod
    def of(cls, plain: nn.Linear, *, by_onednn: bool) -> "FloatLinear":
        """A layer with the same parameters, not copies of them."""
        layer = cls(
            plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta"
        )
        layer.weight, layer.bias = plain.weight, plain.bias
        layer.by_onednn = by_onednn
        return layer.train(plain.training)

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """W x + b."""
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            return functional.linear(x, weight, bias)
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not learns and x.numel() <= FEW * self.in_features and is_dense_native(x, weight):
            return dense(x, weight, bias)
        if self.by_onednn and is_plain_float(x, weight):
            return (learned_product if learns else onednn_linear)(x, weight, bias)
        return functional.linear(x, weight, bias)


def is_plain_float(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these is one of float32 on a CPU."""
    is_float = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return is_float and not torch.is_autocast_enabled("cpu")


class KernelLayer(nn.Module, ABC):
    """A layer whose product is a kernel's, so that others with the same input can join in."""

    @abstractmethod
    def kernel(self) -> PackedLinear:
        """The weight ready to be called."""


def project(x: Float[Tensor, "... K"], *layers: nn.Module) -> list[Float[Tensor, "... out"]]:
    """Each layer's output for the same input; packed layers (quant/linear.py) share one call."""
    learns = torch.is_grad_enabled() and x.requires_grad
    if x.device.type == "cpu" and not learns and not torch.compiler.is_compiling():
        kernels = [layer.kernel() for layer in layers if isinstance(layer, KernelLayer)]
        if len(kernels) == len(layers) and len({kernel.kind for kernel in kernels}) == 1:
            return linears(x, kernels)
    return [layer(x) for layer in layers]
