"""Frozen linear layers in 4-bit normal floats, for training adapters beside them.

    row of a weight --blocks of 64--> largest magnitude m, and w / m as the nearest of 16 values
    stored: two numbers a byte, m in float32: 4.5 bits a weight; m in 8 bits (scales.py): 4.13

The 16 values are quantiles of a normal distribution, which trained weights nearly follow. Blocks
and bytes are those of bitsandbytes, which makes the floats again where it can (bnb.py).

Source: Dettmers et al. 2023, QLoRA section 3 and appendix E (the values).
Note: blocks lie along rows, and a row that is no multiple of 64 long ends in a block with zeros;
    bitsandbytes lets the block go on in the next row.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from lapilli.nn.stored import StoredLinear
from lapilli.quant import bnb
from lapilli.quant.scales import ExactScales, RoundedScales
from lapilli.shapes import Float, Tensor, UInt8

BLOCK = 64
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ROWS = 1024  # rounded at once


class Nf4Linear(StoredLinear):
    """W x + b with W in 4-bit normal floats.

    Attributes:
        qweight: two numbers a byte, the first in the high half.
        scales: the largest magnitude of every block.
        stored_bias: as the layer had it, or None.
    """

    qweight: UInt8[Tensor, "out half"]
    stored_bias: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        *,
        double_quant: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        pieces = [_round(weight[at : at + _ROWS]) for at in range(0, len(weight), _ROWS)]
        largest = torch.cat([largest for _, largest in pieces])
        self.register_buffer("qweight", torch.cat([numbers for numbers, _ in pieces]))
        self.scales = (RoundedScales if double_quant else ExactScales)(largest)
        self.register_buffer("stored_bias", None if bias is None else bias.detach().clone())

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether bitsandbytes makes the weight floats: on a CUDA device where it is installed."""
        return bnb.reads_on(self.qweight.device)

    @property
    def rows_at_once(self) -> int:
        """All where nothing is made on the way to the floats, as bitsandbytes itself does it."""
        return self.out_features if self.by_bitsandbytes else super().rows_at_once

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """The layer's output of exactly the stored weight."""
        return self.product(x)

    def weight_rows(self, start: int, stop: int) -> Float[Tensor, "rows in"]:
        """See StoredLinear."""
        return self._floats(start, stop, torch.float32)

    def rows_like(self, start: int, stop: int, other: Tensor) -> Float[Tensor, "rows in"]:
        """See StoredLinear."""
        return self._floats(start, stop, other.dtype)

    def _floats(self, start: int, stop: int, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
        read = bnb.to_floats if self.by_bitsandbytes else to_floats
        found = read(self.qweight[start:stop], self.scales.rows(start, stop), dtype=dtype)
        return found[:, : self.in_features]

    @property
    def plain_bias(self) -> Float[Tensor, " out"] | None:
        """The bias."""
        return self.stored_bias

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"


def to_floats(
    numbers: UInt8[Tensor, "rows half"],
    largest: Float[Tensor, "rows blocks"],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "rows inputs"]:
    """The values of the numbers times the largest of their block, on plain torch."""
    halves = torch.stack((numbers >> 4, numbers & 15), dim=-1)
    values = torch.tensor(VALUES, device=numbers.device)[halves.int()]
    blocks = values.view(*largest.shape, BLOCK) * largest[:, :, None]
    return blocks.flatten(1).to(dtype)


def _round(weight: Tensor) -> tuple[UInt8[Tensor, "rows half"], Float[Tensor, "rows blocks"]]:
    rows = functional.pad(weight.detach().float(), (0, -weight.shape[1] % BLOCK))
    blocks = rows.view(len(rows), -1, BLOCK)
    largest = blocks.abs().amax(dim=-1)
    factor = torch.where(largest > 0, 1.0 / largest, 0.0)
    values = torch.tensor(VALUES, device=weight.device)
    borders = (values[1:] + values[:-1]) / 2
    numbers = torch.bucketize(blocks * factor[..., None], borders).to(torch.uint8)
    pairs = numbers.view(len(rows), -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1], largest


def store_nf4(model: nn.Module, paths: Iterable[str], *, double_quant: bool = False) -> None:
    """The linear layers of these paths in 4-bit normal floats; the model is changed in place."""
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            stored = Nf4Linear(layer.weight, layer.bias, double_quant=double_quant)
            model.set_submodule(path, stored.train(layer.training))
