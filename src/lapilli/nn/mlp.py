"""Feed-forward blocks and their activation functions."""

import torch
from torch import nn

from lapilli.config.model import Activation
from lapilli.errors import ConfigError
from lapilli.kernels.fused import gelu_mul, silu_mul
from lapilli.nn.linear import project
from lapilli.shapes import Float, Tensor


class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI trained CLIP with: x * sigmoid(1.702 x)."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the activation of every element."""
        return x * torch.sigmoid(1.702 * x)


def is_gelu_tanh(activation: nn.Module) -> bool:
    """Return whether an activation is GELU by its tanh form."""
    return type(activation) is nn.GELU and activation.approximate == "tanh"


def build_activation(name: Activation) -> nn.Module:
    """Build the module of an activation.

    Note: `gelu` is the exact erf form, `gelu_tanh` the approximation; they are never exchanged.

    Raises:
        ConfigError: no activation of this name.
    """
    match name:
        case "silu":
            return nn.SiLU()
        case "gelu":
            return nn.GELU()
        case "gelu_tanh":
            return nn.GELU(approximate="tanh")
        case "quick_gelu":
            return QuickGELU()
        case "relu":
            return nn.ReLU()
    raise ConfigError(f"activation {name!r} is unknown: silu, gelu, gelu_tanh, quick_gelu, relu")


PIECE_BYTES = 16 << 20
"""Of one intermediate: a longer prompt goes through a block in pieces, so that memory does not grow
with it. A piece is still hundreds of rows, which is what products are fast with."""


class GatedMLP(nn.Module):
    """A gated feed-forward block: down(activation(gate(x)) * up(x)).

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
    """The feed-forward block of vision transformers: fc2(activation(fc1(x)))."""

    def __init__(self, width: int, inner: int, *, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.act = build_activation(activation)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return the block's update, without the residual."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out
