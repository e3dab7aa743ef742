"""Rounding of weights to 4 bits with nonlinear levels (packing.py): the search for scales of spans.

The native search and its plain twin try the same numbers; where two are equally good they may
choose differently, since they sum in another order.
"""

import ctypes
from dataclasses import replace

import torch

from lapilli.errors import ConfigError
from lapilli.kernels.library import Library, RoundCall, address, native
from lapilli.kernels.packing import (
    BLOCK,
    CHUNK,
    LEVELS,
    SPAN,
    Packed,
    block_bias,
    by_block,
    empty_packed,
    pack4,
    pad_to,
)
from lapilli.shapes import Float, Tensor

_SHARES = (1.0, 0.9, 0.8)
_TURNS = 2
_AROUND = (0, -1, 1)
_PIECE = 1 << 18  # weights that the twin rounds at once


def round_levels(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, group_size: int = 128
) -> Packed:
    """Round a linear layer to 4 bits, looking for the scales of the least weighted squared error.

    A weight counts by sqrt(2 * mean square of its span + its square), so that large ones, which
    matter more to the output, are hit better.

    Args:
        weight: of any floating dtype.
        bias: kept in float32.
        group_size: inputs that share a scale of the activations.

    Raises:
        ConfigError: weights that are no numbers, or too large for a scale.
    """
    library = native()
    if library is None or weight.device.type != "cpu":
        return round_levels_reference(weight, bias, group_size)
    return round_levels_native(library, weight, bias, group_size)


def round_levels_native(
    library: Library,
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    group_size: int,
) -> Packed:
    """Compute `round_levels` by the library."""
    rows = weight.detach().float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out_features, in_features = rows.shape
    empty = empty_packed(out_features, in_features, 4, group_size, levels="nonlinear")
    packed = replace(empty, bias=block_bias(bias))
    refused = ctypes.c_int64(0)
    call = RoundCall(
        w=rows.data_ptr(),
        data=packed.data.data_ptr(),
        row_scales=packed.scales.data_ptr(),
        span_scales=address(packed.span_scales),
        refused=ctypes.addressof(refused),
        rows=rows.shape[0],
        inputs=rows.shape[1],
        padded=-(-rows.shape[1] // CHUNK) * CHUNK,
        stride=rows.stride(0),
        threads=torch.get_num_threads(),
    )
    library.functions.lapilli_round_levels(ctypes.byref(call))
    if refused.value:
        raise _unfit()
    return packed


def round_levels_reference(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, group_size: int
) -> Packed:
    """Compute `round_levels` in plain torch."""
    out_features, in_features = weight.shape
    padded = -(-in_features // CHUNK) * CHUNK
    at_once = max(_PIECE // in_features // BLOCK, 1) * BLOCK
    data, row_scales, span_scales = [], [], []
    for first in range(0, out_features, at_once):
        piece = weight[first : first + at_once].detach().float()
        if not bool(torch.isfinite(piece).all()):
            raise _unfit()
        spans = _Spans(piece, padded)
        row, whole = spans.search()
        if not bool(torch.isfinite(row).all()):
            raise _unfit()
        nibbles = spans.nibbles(row * whole).to(torch.uint8)
        data.append(pack4(nibbles.reshape(len(piece), -1).contiguous()))
        row_scales.append(row.view(len(piece)))
        span_scales.append(by_block(whole.view(len(piece), -1).to(torch.int8)))
    rows = by_block(torch.cat(row_scales)[:, None])[:, 0]
    sizes = (out_features, in_features, group_size, 4)
    spans_of = torch.cat(span_scales)
    return Packed(torch.cat(data), rows, None, block_bias(bias), *sizes, span_scales=spans_of)


def _unfit() -> ConfigError:
    return ConfigError(
        "weights that are no numbers, or too large for a float32 scale, do not fit into 4 bits: "
        "are the files damaged?"
    )


class _Spans:
    """Spans of weights [row, span, 16] and what is tried for them: scales [row, span, 1]."""

    def __init__(self, rows: Float[Tensor, "rows in"], padded: int) -> None:
        self.x = pad_to(rows, 1, padded, 0).view(len(rows), -1, SPAN)
        valid = pad_to(torch.ones_like(rows[:1]), 1, padded, 0).view(1, -1, SPAN)
        count = valid.sum(-1, keepdim=True).clamp(min=1)
        square = (self.x * self.x).sum(-1, keepdim=True)
        self.weight = (square * (2 / count) + self.x * self.x).sqrt() * valid
        self.levels = torch.tensor(LEVELS, dtype=torch.float32, device=rows.device)
        self.between = (self.levels[1:] + self.levels[:-1]) / 2

    def nibbles(self, scale: Tensor) -> Tensor:
        """Return the nearest nibbles; between two levels the lower one."""
        factor = torch.where(scale == 0, 0.0, 1.0 / scale)
        return torch.bucketize(self.x * factor, self.between)

    def error(self, scale: Tensor) -> Tensor:
        """Return the weighted squared errors of spans."""
        miss = self.x - scale * self.levels[self.nibbles(scale)]
        return (self.weight * miss * miss).sum(-1, keepdim=True)

    def refit(self, scale: Tensor) -> Tensor:
        """Return the scale by least squares for the levels that are nearest at another one."""
        level = self.levels[self.nibbles(scale)]
        weighted = self.weight * level
        above = (weighted * self.x).sum(-1, keepdim=True)
        return above / (weighted * level).sum(-1, keepdim=True)

    def fit(self) -> Tensor:
        """Return the scale of every span as a real number, 0 for one of zeros."""
        low = self.x.amin(-1, keepdim=True).clamp(max=0)
        high = self.x.amax(-1, keepdim=True).clamp(min=0)
        empty = high - low < 1e-30
        best, best_error = torch.zeros_like(low), torch.full_like(low, torch.inf)
        for up, down, sign in ((high, -low, 1.0), (-low, high, -1.0)):
            covers = torch.maximum(up / LEVELS[-1], down / -LEVELS[0])
            for share in _SHARES:
                scale = torch.where(empty, 1.0, covers * (share * sign))
                for _ in range(_TURNS):
                    scale = self.refit(scale)
                error = self.error(scale)
                better = error < best_error
                best = torch.where(better, scale, best)
                best_error = torch.where(better, error, best_error)
        return torch.where(empty, 0.0, best)

    def search(self) -> tuple[Tensor, Tensor]:
        """Return the scale of every row [row, 1, 1] and whole ones of its spans, -127 to 127."""
        fits = self.fit()
        row = fits.abs().amax(1, keepdim=True) / 127
        middle = torch.where(row == 0, 0.0, fits / row).round()
        best, best_error = middle, torch.full_like(middle, torch.inf)
        for more in _AROUND:
            whole = (middle + more).clamp(-127, 127)
            error = self.error(whole * row)
            better = error < best_error
            best = torch.where(better, whole, best)
            best_error = torch.where(better, error, best_error)
        return row, best
