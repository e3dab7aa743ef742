"""Frozen linear layers whose weight is stored in few bits, with gradients of their input.

    forward    y = x W^T + b        W made floats again, some rows at a time
    backward   grad x = grad y W    the same

Knows no format; what is stored how is known by quant/.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from lapilli.nn.onednn import times_transposed
from lapilli.shapes import Float, Tensor


class StoredLinear(nn.Module, ABC):
    """W x + b with a frozen W that is no tensor of floats.

    Attributes:
        in_features: of x.
        out_features: of what comes out.
    """

    in_features: int
    out_features: int

    @abstractmethod
    def weight_rows(self, start: int, stop: int) -> Float[Tensor, "rows in"]:
        """Rows `start` to `stop` of W in float32; `start` is a multiple of 16."""

    def rows_like(self, start: int, stop: int, other: Tensor) -> Float[Tensor, "rows in"]:
        """The same in the dtype of the other factor."""
        return self.weight_rows(start, stop).to(other)

    @property
    def rows_at_once(self) -> int:
        """How many are floats at the same time, a multiple of 16."""
        return 1024

    @property
    @abstractmethod
    def plain_bias(self) -> Float[Tensor, " out"] | None:
        """The bias."""

    def product(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """The layer's output of exactly the stored weight, with the gradient of x."""
        found: Tensor = _StoredProduct.apply(x, self)  # type: ignore[no-untyped-call]  # torch's own
        return found

    def times(self, rows: Float[Tensor, "M K"]) -> Float[Tensor, "M out"]:
        """The product rows W^T + b, without gradients."""
        out = rows.new_empty(len(rows), self.out_features)
        for start, stop in self._pieces():
            out[:, start:stop] = times_transposed(rows, self.rows_like(start, stop, rows))
        bias = self.plain_bias
        return out if bias is None else out.add_(bias.to(rows))

    def times_back(self, rows: Float[Tensor, "M out"]) -> Float[Tensor, "M K"]:
        """The product rows W, without gradients."""
        out = rows.new_zeros(len(rows), self.in_features)
        for start, stop in self._pieces():
            piece = self.rows_like(start, stop, rows)
            out += times_transposed(rows[:, start:stop], piece.t())
        return out

    def _pieces(self) -> list[tuple[int, int]]:
        size = self.rows_at_once
        starts = range(0, self.out_features, size)
        return [(start, min(start + size, self.out_features)) for start in starts]


class _StoredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # noqa: ANN401  torch's protocol
        x, layer = given
        ctx.layer = layer
        out: Tensor = layer.times(x.reshape(-1, layer.in_features))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401  torch's protocol
        (gradient,) = gradients
        rows = gradient.reshape(-1, ctx.layer.out_features)
        return ctx.layer.times_back(rows).view(*gradient.shape[:-1], -1), None
