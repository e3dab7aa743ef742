"""Rounding of float weights to packed ones: to nearest, at 4 bits with a search for the scale.

8 bits   by output channel:  q = round(w / s),  s = max|w| / 127
4 bits   by group, symmetric:  q - 8 = round(w / s) in -8..7, s signed so that the largest weight
         can take the -8;  with zeros:  q = round(w / s) + z in 0..15, as AWQ's files have it
"""

import torch

from lapilli.errors import ConfigError
from lapilli.kernels.packing import (
    BLOCK,
    BYTE_ZERO,
    CHUNK,
    NIBBLE_ZERO,
    Packed,
    block_bias,
    by_block,
    pack4,
    pack8,
    pad_to,
)
from lapilli.quant.config import QuantConfig
from lapilli.shapes import Float, Tensor

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_HALF_MAX = 65504.0
_PIECE = 1 << 18  # weights rounded at once: what is computed of them stays in the cache


def round8(weight: Float[Tensor, "out in"], bias: Tensor | None, group_size: int = 128) -> Packed:
    """Round a linear layer to 8 bits; `group_size` is of the activations."""
    out_features, in_features = weight.shape
    values = torch.empty((out_features, in_features), dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, dtype=torch.float32, device=weight.device)
    step = _rows_at_once(in_features)
    for rows in range(0, out_features, step):
        piece = weight[rows : rows + step].detach().float()
        scale = piece.abs().amax(dim=1) / 127.0
        factor = torch.where(scale > 0, 1.0 / scale, 0.0)
        near = (piece * factor[:, None]).round_().clamp_(-127, 127)
        values[rows : rows + step] = (near + BYTE_ZERO).to(torch.uint8)
        scales[rows : rows + step] = scale
    blocked = by_block(scales[:, None])[:, 0]
    return Packed(
        pack8(values), blocked, None, block_bias(bias), out_features, in_features, group_size, 8
    )


def round4(weight: Float[Tensor, "out in"], bias: Tensor | None, config: QuantConfig) -> Packed:
    """Round a linear layer to 4 bits.

    Raises:
        ConfigError: weights too large for a float16 scale.
    """
    out_features, in_features = weight.shape
    groups = -(-in_features // config.group_size)
    padded = -(-in_features // CHUNK) * CHUNK
    data, scales, zeros = [], [], []
    step = _rows_at_once(in_features)
    for rows in range(0, out_features, step):
        piece = weight[rows : rows + step].detach().float()
        piece = pad_to(piece, 1, config.group_size, 0).view(len(piece), groups, -1)
        values, scale, zero = (_symmetric if config.symmetric else _with_zeros)(piece, config)
        if not bool(torch.isfinite(scale).all()):
            raise ConfigError(f"weights above {_HALF_MAX:.0f} x 8 do not fit into 4 bits")
        flat = values.to(torch.uint8).view(len(piece), -1)[:, :padded]
        data.append(pack4(flat.contiguous()))
        scales.append(by_block(scale))
        zeros.append(by_block(zero))
    return Packed(
        torch.cat(data),
        torch.cat(scales),
        None if config.symmetric else torch.cat(zeros),
        block_bias(bias),
        out_features,
        in_features,
        config.group_size,
        4,
    )


def _rows_at_once(in_features: int) -> int:
    """Return a number of rows that is one of whole blocks."""
    return max(_PIECE // in_features // BLOCK, 1) * BLOCK


_Rounded = tuple[Tensor, Tensor, Tensor]


def _quantized(groups: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
    """Return nibbles of groups [rows, groups, group] as floats."""
    factor = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (groups * factor[..., None]).round_().add_(zero).clamp_(0, 15)


def _symmetric(groups: Tensor, config: QuantConfig) -> _Rounded:
    """Return nibbles, scales and zeros; the scale of the least squared error among a few."""
    index = groups.abs().argmax(dim=-1, keepdim=True)
    cover = groups.gather(-1, index).squeeze(-1) / -8.0
    best_error: Tensor | None = None
    best, best_scale = groups, cover.half()
    for shrink in _SHRINK if config.search else _SHRINK[:1]:
        scale = (cover * shrink).half()
        values = _quantized(groups, scale.float(), NIBBLE_ZERO)
        error = ((values - NIBBLE_ZERO) * scale.float()[..., None] - groups).square_().sum(-1)
        if best_error is None:
            best_error, best, best_scale = error, values, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[..., None], values, best)
        best_scale = torch.where(better, scale, best_scale)
    return best, best_scale, torch.full_like(cover, NIBBLE_ZERO, dtype=torch.uint8)


def _with_zeros(groups: Tensor, config: QuantConfig) -> _Rounded:
    """Return nibbles, scales and zeros that cover the range from the least to the largest weight.

    Note: the range always contains 0, so that padding and zero weights stay zero; AWQ's own rule
    does not, and loses groups of one sign.
    """
    del config
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15.0).half()
    exact = scale.float()
    zero = torch.where(exact == 0, 0.0, -low / exact).round_().clamp_(0, 15)
    return _quantized(groups, exact, zero[..., None]), scale, zero.to(torch.uint8)
