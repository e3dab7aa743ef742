"""Rotary positions: frequencies, their scalings, the table of one forward pass, the rotation.

Frequencies are never a buffer: a model built on the meta device and filled by assignment would
keep them empty. They are a few numbers computed from the configuration.
"""

import math

import torch

from lapilli.config.model import DecoderConfig, RopeScaling
from lapilli.kernels import fused
from lapilli.shapes import Float, Int, Tensor


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


def rotate(
    x: Float[Tensor, "B heads T A"],
    cos: Float[Tensor, "B 1 T A"],
    signed_sin: Float[Tensor, "B 1 T A"],
) -> Float[Tensor, "B heads T A"]:
    """Turn each pair (i, i + A/2) of a head by the angle of its position."""
    return fused.rotate(x, cos, signed_sin)
