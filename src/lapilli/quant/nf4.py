"""Frozen linear layers in 4-bit normal floats (NF4), for training adapters beside them.

    row of a weight --blocks of 64--> largest magnitude m, and w / m as the nearest of 16 values
    stored: two numbers a byte, m in float32: 4.5 bits a weight

    double quantization of the m:
    m - their mean --blocks of 256--> largest magnitude M, and the nearest of 256 values of M
    stored: one byte an m, M in float32: 4.13 bits a weight

The 16 values are quantiles of a normal distribution, which trained weights nearly follow. The 256
have a sign and seven decades, 1e-6 to 1, each cut twice as finely as the one below. Blocks and
bytes are those of bitsandbytes, which makes the floats again on a CUDA device where it is
installed; elsewhere torch does.

Source: Dettmers et al. 2023, QLoRA section 3 and appendix E (the values), and bitsandbytes for mean
    and values; Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning" section 2
    (dynamic trees).
Note: blocks lie along rows, and a row that is no multiple of 64 long ends in a block with zeros;
    bitsandbytes lets the block go on in the next row.
"""

import functools
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional

from lapilli.nn.linear import FrozenQuantizedLinear
from lapilli.shapes import Float, Tensor, UInt8

_SCALES_BLOCK = 256
_DECADES = 7


def dynamic_values() -> Float[Tensor, "256"]:
    """Return the values of a byte, ascending from about -1 to 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(_DECADES):
        borders = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (borders[1:] + borders[:-1]) / 2 * 10.0 ** (decade + 1 - _DECADES)
        values += [middles, -middles]
    return torch.cat(values).sort().values


class ExactScales(nn.Module):
    """Scales [rows, blocks] in float32."""

    floats: Float[Tensor, "rows blocks"]

    def __init__(self, scales: Float[Tensor, "rows blocks"]) -> None:
        super().__init__()
        self.register_buffer("floats", scales)

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows blocks"]:
        """Return rows `start` to `stop`."""
        return self.floats[start:stop]


class RoundedScales(nn.Module):
    """Scales [rows, blocks] in a byte each.

    Attributes:
        codes: number of the value.
        largest: of every 256 scales, all rows in one line.
        mean: of all scales.
        values: of a byte.
    """

    codes: UInt8[Tensor, "rows blocks"]
    largest: Float[Tensor, " groups"]
    mean: Float[Tensor, ""]
    values: Float[Tensor, "256"]

    def __init__(self, scales: Float[Tensor, "rows blocks"]) -> None:
        super().__init__()
        mean = scales.mean()
        line = (scales - mean).flatten()
        groups = functional.pad(line, (0, -len(line) % _SCALES_BLOCK)).view(-1, _SCALES_BLOCK)
        largest = groups.abs().amax(dim=1)
        factor = torch.where(largest > 0, 1.0 / largest, 0.0)
        values = dynamic_values().to(scales.device)
        codes = torch.bucketize(groups * factor[:, None], (values[1:] + values[:-1]) / 2)
        self.register_buffer("codes", codes.flatten()[: len(line)].view_as(scales).to(torch.uint8))
        self.register_buffer("largest", largest)
        self.register_buffer("mean", mean)
        self.register_buffer("values", values)

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows blocks"]:
        """Return rows `start` to `stop` as floats."""
        codes = self.codes[start:stop]
        first = start * codes.shape[1]
        places = torch.arange(first, first + codes.numel(), device=codes.device)
        largest = self.largest[places // _SCALES_BLOCK].view(codes.shape)
        return self.values[codes.int()] * largest + self.mean


def uses_bitsandbytes(device: torch.device) -> bool:
    """Return whether bitsandbytes reads the layers of this device."""
    return device.type == "cuda" and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return find_spec("bitsandbytes") is not None


def bitsandbytes_floats(
    numbers: UInt8[Tensor, "rows half"],
    largest: Float[Tensor, "rows blocks"],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "rows inputs"]:
    """Return the values of the numbers times the largest of their block, by bitsandbytes.

    Args:
        numbers: of whole blocks.
        largest: of every block.
        dtype: float32, bfloat16 or float16.

    Raises:
        ImportError: bitsandbytes cannot be imported.
    """
    rows, half = numbers.shape
    functional = import_module("bitsandbytes").functional
    state = functional.QuantState(
        absmax=largest.flatten(),
        shape=torch.Size((rows, 2 * half)),
        dtype=dtype,
        blocksize=2 * half // largest.shape[1],
        quant_type="nf4",
    )
    found: Tensor = functional.dequantize_4bit(numbers.reshape(-1, 1), state)
    return found


BLOCK = 64
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ROWS = 1024  # rounded at once


class Nf4Linear(FrozenQuantizedLinear):
    """A linear layer, W x + b, with W in 4-bit normal floats.

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
        """Return whether bitsandbytes makes the weight floats: on CUDA where it is installed."""
        return uses_bitsandbytes(self.qweight.device)

    @property
    def rows_at_once(self) -> int:
        """Return all rows where bitsandbytes reads them, as it does itself."""
        return self.out_features if self.by_bitsandbytes else super().rows_at_once

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """Return the layer's output of exactly the stored weight."""
        return self.product(x)

    def weight_rows(self, start: int, stop: int) -> Float[Tensor, "rows in"]:
        """Return rows of W in float32, see FrozenQuantizedLinear."""
        return self._floats(start, stop, torch.float32)

    def rows_like(self, start: int, stop: int, other: Tensor) -> Float[Tensor, "rows in"]:
        """Return rows of W in another dtype, see FrozenQuantizedLinear."""
        return self._floats(start, stop, other.dtype)

    def _floats(self, start: int, stop: int, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
        read = bitsandbytes_floats if self.by_bitsandbytes else to_floats
        found = read(self.qweight[start:stop], self.scales.rows(start, stop), dtype=dtype)
        return found[:, : self.in_features]

    @property
    def plain_bias(self) -> Float[Tensor, " out"] | None:
        """Return the bias."""
        return self.stored_bias

    def extra_repr(self) -> str:
        """Return sizes, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"


def to_floats(
    numbers: UInt8[Tensor, "rows half"],
    largest: Float[Tensor, "rows blocks"],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "rows inputs"]:
    """Return the values of the numbers times the largest of their block, by plain torch."""
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
    """Store the linear layers of these paths in 4-bit normal floats; the model changes in place."""
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            stored = Nf4Linear(layer.weight, layer.bias, double_quant=double_quant)
            model.set_submodule(path, stored.train(layer.training))
