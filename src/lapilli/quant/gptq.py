"""GPTQ: what rounding one input's weights misses is made up for by those that follow.

Inputs are rounded one after another, those with the largest activations first, and the error of
each is spread over the rest as the second moments of the inputs say. The scales are those of plain
rounding and belong to groups of neighbours, so the order leaves no trace in the files.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), algorithm 1; act-order with static groups as
in its authors' code.
"""

from dataclasses import dataclass, replace

import torch

from lapilli.errors import ConfigError
from lapilli.kernels.packing import (
    BYTE_ZERO,
    LEVELS,
    NIBBLE_ZERO,
    SPAN,
    Packed,
    by_row,
    pack4,
    pack8,
)
from lapilli.quant.activations import SHARED_INPUTS, CalibrationLayer, linear_of
from lapilli.quant.quantize import nibbles_of
from lapilli.shapes import Float, Tensor, UInt8

_AT_ONCE = 128  # inputs whose errors are spread over the others together
_DAMPING = (0.01, 0.1, 1.0)


@torch.no_grad()
def quantize_by_gptq(calibration: CalibrationLayer) -> dict[str, float]:
    """Pack the linear layers of `calibration.layer`, which was observed with second moments."""
    layer, rounding = calibration.layer, calibration.rounding
    for first, names in SHARED_INPUTS.items():
        gram = calibration.seen[first].gram
        if gram is None:
            raise ConfigError("GPTQ needs the second moments of inputs: observe(gram=True)")
        order = gram.diagonal().argsort(descending=True)
        spread = spread_of(gram, order, what=f"layer {calibration.index}, {first}")
        for name in names:
            if name not in rounding.names:
                continue
            linear = linear_of(layer, name)
            packed = rounding.pack(name, linear.weight, linear.bias)
            levels = nibbles_of(rounding.bits_of(name), rounding.config.levels)
            grid = Grid.of(packed, (1, 255) if packed.bits == 8 else levels)
            codes = round_in_turn(linear.weight, spread, order, grid)
            layer.set_submodule(name, rounding.linear(grid.pack(codes)))
    return {}


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that the weights of a packed layer can take.

    Attributes:
        packed: gives the scales.
        scales: of each span of inputs, by row.
        zeros: what zero is stored as, likewise, or for all.
        width: inputs of a span.
        span: the least and the largest stored integer.
    """

    packed: Packed
    scales: Float[Tensor, "spans rows"]
    zeros: Tensor | int
    width: int
    span: tuple[int, int]

    @classmethod
    def of(cls, packed: Packed, span: tuple[int, int]) -> "Grid":
        """Return the grid that a weight was rounded to."""
        rows = packed.out_features
        if packed.bits == 8:
            scales = packed.scales.view(1, -1)[:, :rows]
            return cls(packed, scales, BYTE_ZERO, packed.in_features, span)
        if packed.span_scales is not None:
            whole = by_row(packed.span_scales).float() * packed.scales.view(-1, 1)
            return cls(packed, whole[:rows].t().contiguous(), 0, SPAN, span)
        scales = by_row(packed.scales).float()[:rows].t().contiguous()
        zeros: Tensor | int = NIBBLE_ZERO
        if packed.zeros is not None:
            zeros = by_row(packed.zeros).float()[:rows].t().contiguous()
        return cls(packed, scales, zeros, packed.group_size, span)

    def nearest(self, column: int, values: Float[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
        """Return the stored integers nearest to the weights of one input, and their values."""
        scale = self.scales[column // self.width]
        steps = values * torch.where(scale == 0, 0.0, 1.0 / scale)
        if self.packed.span_scales is not None:
            levels = torch.tensor(LEVELS, dtype=torch.float32, device=values.device)
            codes = torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2)
            return codes, levels[codes] * scale
        zero = self.zeros if isinstance(self.zeros, int) else self.zeros[column // self.width]
        codes = (steps.round() + zero).clamp(*self.span)
        return codes, (codes - zero) * scale

    def pack(self, codes: UInt8[Tensor, "rows in"]) -> Packed:
        """Return the packed layer with other integers."""
        pack = pack8 if self.packed.bits == 8 else pack4
        return replace(self.packed, data=pack(codes))


def spread_of(gram: Float[Tensor, "in in"], order: Tensor, *, what: str) -> Float[Tensor, "in in"]:
    """Return the upper Cholesky factor of the inverse of the second moments, inputs in `order`.

    Inputs that were never seen spread nothing.

    Raises:
        ConfigError: they are no moments of numbers.
    """
    moments = gram[order][:, order].double() if len(gram) <= 1024 else gram[order][:, order].clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean()
    for damping in _DAMPING:
        damped = moments.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not bool(failed):
                found: Tensor = upper.float()
                return found
    raise ConfigError(f"{what}: the second moments of its inputs are not those of numbers")


def round_in_turn(
    weight: Float[Tensor, "out in"], spread: Float[Tensor, "in in"], order: Tensor, grid: Grid
) -> UInt8[Tensor, "out in"]:
    """Return the stored integers of a weight whose inputs are rounded in `order`."""
    left = weight.t()[order].contiguous()  # [in, out]: what is still to be rounded
    codes = torch.empty_like(left, dtype=torch.uint8)
    columns = order.tolist()
    for start in range(0, len(left), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(left))
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            code, value = grid.nearest(columns[at], left[at])
            codes[at] = code
            error = (left[at] - value) / spread[at, at]
            left[at + 1 : stop].addr_(spread[at, at + 1 : stop], error, alpha=-1)
            errors[at - start] = error
        left[stop:].addmm_(spread[start:stop, stop:].t(), errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous()
