"""Feed-forward blocks; knows no model family."""

from torch import nn

from lapilli.config.model import Activation
from lapilli.kernels.fused import silu_mul
from lapilli.nn.activation import build_activation
from lapilli.nn.linear import project
from lapilli.shapes import Float, Tensor


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)).

    Source: Shazeer 2020, "GLU variants improve transformer" (SwiGLU with silu).
    """

    def __init__(self, width: int, inner: int, *, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act = build_activation(activation)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The block's update, without the residual."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        is_silu = isinstance(self.act, nn.SiLU)
        out: Tensor = self.down_proj(silu_mul(gate, up) if is_silu else self.act(gate) * up)
        return out


class MLP(nn.Module):
    """fc2(activation(fc1(x))), the block of vision transformers."""

    def __init__(self, width: int, inner: int, *, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.act = build_activation(activation)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The block's update, without the residual."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out
