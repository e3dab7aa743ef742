"""Parts of a layer besides attention: norms, activations, feed-forward blocks, rotary positions.

Frequencies of rotary positions are never a buffer: a model built on the meta device and filled by
assignment would keep them empty. They are a few numbers computed from the configuration.

Knows the configuration of a decoder; must not know which family a layer belongs to.
"""

import math

import torch
from torch import nn

from lapilli.config.model import Activation, DecoderConfig, RopeScaling
from lapilli.errors import ConfigError
from lapilli.kernels.layer import gelu_mul, rms_norm, silu_mul
from lapilli.nn.linear import is_hooked, project
from lapilli.shapes import Float, Int, Tensor


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
        if not torch.compiler.is_compiling() and is_hooked(self.act):
            seen: Tensor = self.act(gate) * up
            return seen
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


def inverse_frequencies(head_dim: int, theta: float) -> Float[Tensor, " half"]:
    """Return the angle per position of each pair, [A / 2], float32 on the CPU.

    Source: Su et al. 2021, RoFormer 3.2.2.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return 1.0 / theta**exponent


def stretch_llama3(
    frequencies: Float[Tensor, " half"], scaling: RopeScaling
) -> Float[Tensor, " half"]:
    """Return slow frequencies divided by the factor, fast ones kept, a ramp between.

    Source: Llama 3.1 rope_scaling of type "llama3".
    """
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def stretch_dynamic(
    length: Float[Tensor, "B 1 1"], config: DecoderConfig, factor: float
) -> Float[Tensor, "B 1 half"]:
    """Return frequencies of rows of these lengths: theta grows once a row is longer than trained.

    Source: Hugging Face rope type "dynamic" (NTK-aware scaling by the sequence length).
    Note: every row has its own length, so a batch equals its solo runs; Hugging Face takes the
    longest row for all of them.
    """
    longest = config.max_positions
    ratio = factor * length.clamp(min=longest) / longest - (factor - 1.0)
    theta = config.rope_theta * ratio ** (config.head_dim / (config.head_dim - 2))
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=length.device)
    return 1.0 / theta ** (steps / config.head_dim)


class Rotary:
    """Cosines and sines of positions for one DecoderConfig; holds no parameter and no buffer.

    Args:
        config: of the decoder.
        local: those of its local layers, where they have positions of their own.
    """

    def __init__(self, config: DecoderConfig, *, local: bool = False) -> None:
        theta, scaling = config.rope_theta, config.rope_scaling
        if local and config.local_rope_theta is not None:
            theta, scaling = config.local_rope_theta, None
        self._config = config
        frequencies = inverse_frequencies(config.head_dim, theta)
        if scaling is not None and scaling.kind == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling is not None and scaling.kind == "llama3":
            frequencies = stretch_llama3(frequencies, scaling)
        self._frequencies = frequencies
        self._dynamic_factor = (
            scaling.factor if scaling is not None and scaling.kind == "dynamic" else None
        )

    def table(
        self, position_ids: Int[Tensor, "B T"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "B 1 T A"], Float[Tensor, "B 1 T A"]]:
        """Return cosines and signed sines of positions, once for all layers of a forward pass.

        The sines of the first half carry the minus of the rotation, see `rotate`. Angles are
        float32 whatever the dtype.
        """
        positions = position_ids[:, :, None].float()
        if self._dynamic_factor is None:
            if self._frequencies.device != position_ids.device:
                self._frequencies = self._frequencies.to(position_ids.device)
            angles = positions * self._frequencies
        else:
            length = positions.amax(dim=1, keepdim=True) + 1
            angles = positions * stretch_dynamic(length, self._config, self._dynamic_factor)
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), dim=-1).to(dtype)[:, None],
            torch.cat((-sin, sin), dim=-1).to(dtype)[:, None],
        )
