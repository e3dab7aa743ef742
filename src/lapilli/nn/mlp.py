"""Feed-forward blocks; knows no model family."""

import torch
from torch import nn

from lapilli.config.model import Activation
from lapilli.kernels.fused import gelu_mul, silu_mul
from lapilli.nn.activation import build_activation, is_gelu_tanh
from lapilli.nn.linear import project
from lapilli.shapes import Float, Tensor

PIECE_BYTES = 16 << 20
"""Of one intermediate: a longer prompt goes through a block in pieces, so that memory does not grow
with it. A piece is still hundreds of rows, which is what products are fast with."""


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)).

    Source: Shazeer 2020, "GLU variants improve transformer" (SwiGLU with silu).
    """

    def __init__(self, width: int, inner: int, *, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.inner = inner
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = build_activation(activation)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return the block's update, without the residual."""
        rows = max(1, PIECE_BYTES // (self.inner * x.element_size()))
        pieces = -(-x.shape[-2] // rows) if x.dim() > 1 else 1
        if pieces == 1 or torch.is_grad_enabled():
            out: Tensor = self.down_proj(self._gated(x))
            return out
        parts = x.chunk(pieces, dim=-2)
        return torch.cat([self.down_proj(self._gated(part)) for part in parts], dim=-2)

    def _gated(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... inner"]:
        gate, up = project(x, self.gate_proj, self.up_proj)
        if isinstance(self.act, nn.SiLU):
            return silu_mul(gate, up)
        if is_gelu_tanh(self.act):
            return gelu_mul(gate, up)
        gated: Tensor = self.act(gate) * up
        return gated


class MLP(nn.Module):
    """fc2(activation(fc1(x))), the block of vision transformers."""

    def __init__(self, width: int, inner: int, *, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.act = build_activation(activation)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return the block's update, without the residual."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out
