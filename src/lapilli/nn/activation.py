"""Activation functions by name; knows no model family."""

import torch
from torch import nn

from lapilli.config.model import Activation
from lapilli.errors import ConfigError
from lapilli.shapes import Float, Tensor


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI trained CLIP with."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The activation of every element."""
        return x * torch.sigmoid(1.702 * x)


def is_gelu_tanh(activation: nn.Module) -> bool:
    """Whether an activation is GELU by its tanh form."""
    return type(activation) is nn.GELU and activation.approximate == "tanh"


def build_activation(name: Activation) -> nn.Module:
    """The module of an activation.

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
