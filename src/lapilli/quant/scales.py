"""The scales of 4-bit blocks in 8 bits: double quantization.

    scales - their mean --blocks of 256--> largest magnitude m, and the nearest of 256 values of m
    stored: one byte a scale, m in float32: 0.127 bits a weight instead of 0.5

The values have a sign and seven decades, 1e-6 to 1, each cut twice as finely as the one below.

Source: Dettmers et al. 2023, QLoRA section 3, and bitsandbytes for mean and values; Dettmers 2016,
    "8-Bit Approximations for Parallelism in Deep Learning" section 2 (dynamic trees).
"""

import torch
from torch import nn
from torch.nn import functional

from lapilli.shapes import Float, Tensor, UInt8

_BLOCK = 256
_DECADES = 7


def dynamic_values() -> Float[Tensor, "256"]:
    """The values of a byte, ascending from about -1 to 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(_DECADES):
        borders = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (borders[1:] + borders[:-1]) / 2 * 10.0 ** (decade + 1 - _DECADES)
        values += [middles, -middles]
    return torch.cat(values).sort().values


class ExactScales(nn.Module):
    """Scales [rows, blocks] as they are."""

    floats: Float[Tensor, "rows blocks"]

    def __init__(self, scales: Float[Tensor, "rows blocks"]) -> None:
        super().__init__()
        self.register_buffer("floats", scales)

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows blocks"]:
        """Rows `start` to `stop`."""
        return self.floats[start:stop]


class RoundedScales(nn.Module):
    """Scales [rows, blocks], each in a byte.

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
        groups = functional.pad(line, (0, -len(line) % _BLOCK)).view(-1, _BLOCK)
        largest = groups.abs().amax(dim=1)
        factor = torch.where(largest > 0, 1.0 / largest, 0.0)
        values = dynamic_values().to(scales.device)
        codes = torch.bucketize(groups * factor[:, None], (values[1:] + values[:-1]) / 2)
        self.register_buffer("codes", codes.flatten()[: len(line)].view_as(scales).to(torch.uint8))
        self.register_buffer("largest", largest)
        self.register_buffer("mean", mean)
        self.register_buffer("values", values)

    def rows(self, start: int, stop: int) -> Float[Tensor, "rows blocks"]:
        """Rows `start` to `stop` as floats."""
        codes = self.codes[start:stop]
        first = start * codes.shape[1]
        places = torch.arange(first, first + codes.numel(), device=codes.device)
        largest = self.largest[places // _BLOCK].view(codes.shape)
        return self.values[codes.int()] * largest + self.mean
