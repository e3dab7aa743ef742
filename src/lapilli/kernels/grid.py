"""Rounding of weights to 4 bits on a grid (packing.py): the search for scales, steps and centers.

The native search and its plain twin try the same numbers; where two are equally good they may
choose differently, since they sum in another order.
"""

import ctypes
from collections.abc import Iterable

import torch

from lapilli.errors import ConfigError
from lapilli.kernels.library import Library, RoundCall, native
from lapilli.kernels.packing import (
    BLOCK,
    CHUNK,
    GRID_GROUPS,
    MAX_STEP,
    NIBBLE_ZERO,
    Grid,
    Packed,
    block_bias,
    by_block,
    pack4,
    pad_to,
)
from lapilli.shapes import Float, Tensor

_LEAST = 6e-8  # about the smallest positive float16
_FACTORS = (0.90, 0.95, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25)
_SHRINK = (1.0, 0.92)
_MIDDLE = 7.5  # of 16 levels
_PIECE = 1 << 18  # weights that the twin rounds at once


def round_grid(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, group_size: int = 128
) -> Packed:
    """Round a linear layer to 4 bits on a grid, looking for the least weighted squared error.

    A weight counts by sqrt(2 * mean square of its chunk + its square), so that large ones, which
    matter more to the output, are hit better.

    Args:
        weight: of any floating dtype.
        bias: kept in float32.
        group_size: 64 or 128 inputs that share a scale.

    Raises:
        ConfigError: another group size, or weights that are no numbers or too large for a scale.
    """
    if group_size not in GRID_GROUPS:
        raise ConfigError(f"a grid has groups of 64 or 128 inputs, found {group_size}")
    library = native()
    if library is None or weight.device.type != "cpu":
        return round_grid_reference(weight, bias, group_size)
    return round_grid_native(library, weight, bias, group_size)


def round_grid_native(
    library: Library,
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    group_size: int,
) -> Packed:
    """Compute `round_grid` by the library."""
    rows = weight.detach().float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out_features, in_features = rows.shape
    blocks, chunks = -(-out_features // BLOCK), -(-in_features // CHUNK)
    grid = Grid(
        torch.empty((blocks, chunks, BLOCK // 2), dtype=torch.uint8),
        torch.zeros((blocks, -(-chunks // 2), 2 * BLOCK), dtype=torch.int8),
    )
    packed = Packed(
        torch.empty((blocks, chunks * CHUNK // 8, 64), dtype=torch.uint8),
        torch.empty((blocks, -(-chunks * CHUNK // group_size), BLOCK), dtype=torch.float16),
        None,
        block_bias(bias),
        out_features,
        in_features,
        group_size,
        4,
        grid,
    )
    refused = ctypes.c_int64(0)
    call = RoundCall(
        w=rows.data_ptr(),
        data=packed.data.data_ptr(),
        scales=packed.scales.data_ptr(),
        steps=grid.steps.data_ptr(),
        centers=grid.centers.data_ptr(),
        refused=ctypes.addressof(refused),
        rows=out_features,
        inputs=in_features,
        padded=chunks * CHUNK,
        stride=rows.stride(0),
        group=group_size,
        threads=torch.get_num_threads(),
    )
    library.functions.lapilli_round_grid(ctypes.byref(call))
    if refused.value:
        raise _unfit()
    return packed


def _unfit() -> ConfigError:
    return ConfigError(
        "weights that are no numbers, or above 8000000, do not fit into 4 bits: are the files "
        "damaged?"
    )


def round_grid_reference(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, group_size: int
) -> Packed:
    """Compute `round_grid` in plain torch."""
    out_features, in_features = weight.shape
    padded = -(-in_features // CHUNK) * CHUNK
    at_once = max(_PIECE // in_features // BLOCK, 1) * BLOCK
    data, scales, steps, centers = [], [], [], []
    for first in range(0, out_features, at_once):
        piece = weight[first : first + at_once].detach().float()
        group = _Group(piece, group_size)
        scale, step, start = group.search()
        if not bool(torch.isfinite(scale).all()) or not bool(torch.isfinite(piece).all()):
            raise _unfit()
        nibbles = group.nibbles(scale, step, start).to(torch.uint8)
        data.append(pack4(nibbles.reshape(len(piece), -1)[:, :padded].contiguous()))
        scales.append(by_block(scale.half().view(len(piece), -1)))
        steps.append(step.view(len(piece), -1)[:, : padded // CHUNK])
        center = start + NIBBLE_ZERO * step
        centers.append(center.view(len(piece), -1)[:, : padded // CHUNK])
    grid = Grid.pack(torch.cat(steps).int(), torch.cat(centers).int())
    sizes = (out_features, in_features, group_size, 4)
    return Packed(torch.cat(data), torch.cat(scales), None, block_bias(bias), *sizes, grid=grid)


class _Group:
    """Groups of weights [row, group, chunk, 32] and what is tried for them.

    Scales are [row, group, 1, 1], steps, starts and errors [row, group, chunk, 1]; a start is the
    bracket of nibble 0.
    """

    def __init__(self, rows: Float[Tensor, "rows in"], group_size: int) -> None:
        shape = (len(rows), -1, group_size // CHUNK, CHUNK)
        self.x = pad_to(rows, 1, group_size, 0).view(shape)
        valid = pad_to(torch.ones(1, rows.shape[1]), 1, group_size, 0).view(1, *shape[1:])
        count = valid.sum(-1, keepdim=True).clamp(min=1)
        square = (self.x * self.x).sum(-1, keepdim=True) / count
        self.weight = (2 * square + self.x * self.x).sqrt() * valid
        self.total = self.weight.sum(-1, keepdim=True) + 1e-30
        self.low = torch.where(valid > 0, self.x, torch.inf).amin(-1, keepdim=True)
        self.high = torch.where(valid > 0, self.x, -torch.inf).amax(-1, keepdim=True)
        empty = valid.amax(-1, keepdim=True) == 0
        self.low, self.high = self.low.masked_fill(empty, 0), self.high.masked_fill(empty, 0)

    def sum(self, values: Tensor) -> Tensor:
        """Return the weighted sum over a chunk."""
        return (self.weight * values).sum(-1, keepdim=True)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Return step and start of every chunk as real numbers, by least squares in turn."""
        _, step, start = _best(self._fit_from(shrink) for shrink in _SHRINK)
        return step, start

    def _fit_from(self, shrink: float) -> tuple[Tensor, ...]:
        """Return error, step and start of a fit that begins with a part of the range."""
        step = ((self.high - self.low) * (shrink / 15)).clamp(min=1e-12)
        start = (self.low + self.high) / 2 - step * _MIDDLE
        for _ in range(2):
            step, start = self._refit(step, start)
        n = ((self.x - start) / step).round().clamp(0, 15)
        return self.sum((self.x - (start + step * n)) ** 2), step, start

    def _refit(self, step: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        n = ((self.x - start) / step).round().clamp(0, 15)
        n1, n2, x1, xn = (self.sum(v) for v in (n, n * n, self.x, n * self.x))
        below = self.total * n2 - n1 * n1
        found = (self.total * xn - n1 * x1) / torch.where(below > 0, below, 1.0)
        good = (below > 1e-20 * n2) & (found > 0)
        return torch.where(good, found, step), torch.where(
            good, (x1 - found * n1) / self.total, start
        )

    def nibbles(self, scale: Tensor, step: Tensor, start: Tensor) -> Tensor:
        """Return the nearest nibbles whose brackets fit into a signed byte."""
        last = ((127 - start) / step).floor().clamp(max=15)
        n = ((self.x / scale - start) / step).round().clamp(min=0)
        return torch.minimum(n, last)

    def error(self, scale: Tensor, step: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return the errors of chunks in units of the squared scale, and better starts."""
        rest = self.x / scale - step * self.nibbles(scale, step, start)
        return self.sum((rest - start) ** 2), _inside(self.sum(rest) / self.total, step)

    def search(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale, step and start of the least error that is found."""
        step, start = self.fit()
        end = start + 15 * step
        top = torch.maximum(start.abs(), end.abs()).amax(2, keepdim=True).clamp(min=_LEAST)
        scales = (_as_half(top * (factor / 127)) for factor in _FACTORS)
        return self._polish(*_best(self._at(scale, step, start) for scale in scales))

    def _at(self, scale: Tensor, step: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        """Return error, scale, steps and starts of groups with a scale."""
        error, *found = self._choose(scale, step, start)
        return (error * scale * scale).sum(2, keepdim=True), scale, *found

    def _choose(self, scale: Tensor, step: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        """Return error, steps and starts at a scale: the best of the two steps beside the fit."""
        tried = []
        for more in (0, 1):
            whole = ((step / scale).floor() + more).clamp(1, MAX_STEP)
            at = _inside((start + _MIDDLE * step) / scale - _MIDDLE * whole, whole)
            for _ in range(3):
                error, following = self.error(scale, whole, at)
                tried.append((error, whole, at))
                at = following
        return _best(tried)

    def _polish(
        self, error: Tensor, scale: Tensor, step: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scale by least squares where that is better."""
        bracket = start + step * self.nibbles(scale, step, start)
        above = self.sum(bracket * self.x).sum(2, keepdim=True)
        below = self.sum(bracket * bracket).sum(2, keepdim=True) + 1e-30
        other = _as_half(above / below)
        found = self.error(other, step, start)[0].sum(2, keepdim=True) * other * other
        return torch.where(found < error, other, scale), step, start


def _inside(start: Tensor, step: Tensor) -> Tensor:
    """Return whole starts whose center fits into a signed byte."""
    return torch.minimum(start.round().clamp(min=-128), 127 - NIBBLE_ZERO * step)


def _as_half(scale: Tensor) -> Tensor:
    return scale.clamp(min=_LEAST).half().float()


def _best(tried: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return, element by element, what has the smallest error; that comes first in each."""
    best, *others = tried
    for found in others:
        better = found[0] < best[0]
        best = tuple(torch.where(better, a, b) for a, b in zip(found, best, strict=True))
    return best
