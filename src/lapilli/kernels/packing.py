"""Packed layout of quantized weights (native/abi.h draws it) and rounding of activations.

    data    UInt8[block, input / 4 | input / 8, 64]     16 output rows a block, inputs padded to 32
    scales  float16 [block, group, 16] at 4 bits        float32 [block, 16] at 8 bits
    zeros   UInt8[block, group, 16] or None (8)         bias float32 [block, 16] or None

4 bits on a grid: every chunk of 32 inputs has a step and a center of its own, small integers, so
that a weight is scale * (center + step * (nibble - 8)) and products stay integers over a group:

    steps    UInt8[block, chunk, 8]            less one; row j the low, row j + 8 the high nibble
    centers  Int8[block, pair of chunks, 32]   of row j: the bytes 2 j and 2 j + 1

That is 4.5 bits a weight with groups of 128. One layout for every instruction set, so that packed
files fit every machine.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from lapilli.errors import ShapeMismatchError
from lapilli.shapes import Float, Int, Int8, Tensor, UInt8

BLOCK = 16
CHUNK = 32
GROUPS = (32, 64, 128)
BYTE_ZERO = 128
NIBBLE_ZERO = 8

BITS = (4, 8)
GRID_GROUPS = (64, 128)
"""Inputs that share a scale on a grid: pairs of chunks."""
MAX_STEP = 16


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Steps and centers of the chunks of a 4-bit weight, packed as the head of this file says."""

    steps: UInt8[Tensor, "blocks chunks 8"]
    centers: Int8[Tensor, "blocks pairs 32"]

    @staticmethod
    def pack(steps: Int[Tensor, "out chunks"], centers: Int[Tensor, "out chunks"]) -> "Grid":
        """Return steps of 1 to 16 and centers of -128 to 127 as the kernels read them."""
        chunks = steps.shape[1]
        less = by_block(steps.to(torch.uint8) - 1)  # [block, chunk, 16]
        pairs = by_block(functional.pad(centers.to(torch.int8), (0, chunks % 2)))
        pairs = pairs.view(len(pairs), -1, 2, BLOCK).transpose(2, 3)
        return Grid(less[..., :8] | (less[..., 8:] << 4), pairs.flatten(2).contiguous())

    def unpack(self) -> tuple[Int[Tensor, "rows chunks"], Int[Tensor, "rows chunks"]]:
        """Return steps and centers as `pack` took them, with the padding of the rows."""
        steps = torch.cat((self.steps & 15, self.steps >> 4), dim=-1) + 1
        pairs = self.centers.view(*self.centers.shape[:2], BLOCK, 2).transpose(2, 3)
        centers = by_row(pairs.flatten(1, 2))[:, : steps.shape[1]]
        return by_row(steps).int(), centers.int()


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The weight [out_features, in_features] of a linear layer, packed.

    Attributes:
        data: see the head of this file.
        scales: of groups of weights (4 bits) or of output rows (8 bits).
        zeros: what zero is stored as, by group; None: 8 at 4 bits, 128 at 8.
        bias: added to the output.
        out_features: rows before padding.
        in_features: inputs before padding.
        group_size: inputs that share a scale, of the weights (4 bits) and of the activations.
        bits: 4 or 8.
        grid: of 4 bits whose chunks have steps and centers; None: a nibble is scale * (n - zero).
    """

    data: UInt8[Tensor, "blocks steps 64"]
    scales: Tensor
    zeros: UInt8[Tensor, "blocks groups 16"] | None
    bias: Float[Tensor, "blocks 16"] | None
    out_features: int
    in_features: int
    group_size: int
    bits: int
    grid: Grid | None = None

    def __post_init__(self) -> None:
        blocks, padded = -(-self.out_features // BLOCK), -(-self.in_features // CHUNK) * CHUNK
        groups = -(-padded // self.group_size)
        _check("data", self.data, (blocks, padded * self.bits // 32, 64), torch.uint8)
        if self.bits == 4:
            _check("scales", self.scales, (blocks, groups, BLOCK), torch.float16)
        else:
            _check("scales", self.scales, (blocks, BLOCK), torch.float32)
        if self.zeros is not None:
            _check("zeros", self.zeros, (blocks, groups, BLOCK), torch.uint8)
        if self.grid is not None:
            chunks = padded // CHUNK
            _check("steps", self.grid.steps, (blocks, chunks, 8), torch.uint8)
            _check("centers", self.grid.centers, (blocks, -(-chunks // 2), 32), torch.int8)
        if self.bias is not None:
            _check("bias", self.bias, (blocks, BLOCK), torch.float32)

    @property
    def num_bytes(self) -> int:
        """Return the size in memory."""
        grid = () if self.grid is None else (self.grid.steps, self.grid.centers)
        parts = (self.data, self.scales, self.zeros, self.bias, *grid)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def plain_bias(self) -> Float[Tensor, " out"] | None:
        """Return the bias without padding."""
        return None if self.bias is None else self.bias.view(-1)[: self.out_features]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """Return the weight in float32 as the kernels see it."""
        if self.bits == 8:
            values = unpack8(self.data).float() - BYTE_ZERO
            values *= self.scales.view(-1, 1)
            return values[: self.out_features, : self.in_features]
        values = unpack4(self.data).float()
        padded = values.shape[1]
        scales = by_row(self.scales).float().repeat_interleave(self.group_size, dim=1)
        if self.grid is not None:
            steps, centers = self.grid.unpack()
            chunks = values.view(len(values), -1, CHUNK) - NIBBLE_ZERO
            values = (chunks * steps[..., None] + centers[..., None]).flatten(1)
            values *= scales[:, :padded]
            return values[: self.out_features, : self.in_features]
        zeros: Tensor | int = NIBBLE_ZERO
        if self.zeros is not None:
            zeros = by_row(self.zeros).float().repeat_interleave(self.group_size, dim=1)
            zeros = zeros[:, :padded]
        values = (values - zeros) * scales[:, :padded]
        return values[: self.out_features, : self.in_features]


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ShapeMismatchError(
            f"packed {name}: expected {dtype} {list(shape)}, "
            f"found {tensor.dtype} {list(tensor.shape)}"
        )


def pad_to(x: Tensor, rows: int, columns: int, value: int) -> Tensor:
    """Return a matrix filled up to multiples of these sizes."""
    more = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    return functional.pad(x, more, value=value) if any(more) else x


def pack8(values: UInt8[Tensor, "out in"]) -> UInt8[Tensor, "blocks steps 64"]:
    """Pack weights + 128 in blocks."""
    x = pad_to(values, BLOCK, CHUNK, BYTE_ZERO)
    x = x.view(-1, BLOCK, x.shape[1] // 4, 4).transpose(1, 2)  # [block, input / 4, row, 4]
    return x.flatten(2).contiguous()


def unpack8(data: UInt8[Tensor, "blocks steps 64"]) -> UInt8[Tensor, "rows inputs"]:
    """Unpack what `pack8` packed, with the padding."""
    x = data.view(*data.shape[:2], BLOCK, 4).transpose(1, 2)  # [block, row, input / 4, 4]
    return x.reshape(data.shape[0] * BLOCK, -1)


def pack4(
    values: UInt8[Tensor, "out in"], *, fill: int = NIBBLE_ZERO
) -> UInt8[Tensor, "blocks steps 64"]:
    """Pack nibbles (0 to 15) in blocks; padding is filled with a nibble of any value."""
    x = pad_to(values, BLOCK, CHUNK, fill)
    x = x.view(-1, BLOCK, x.shape[1] // 8, 2, 4).permute(0, 2, 3, 1, 4)  # [block, step, 2, row, 4]
    return (x[:, :, 0] | (x[:, :, 1] << 4)).flatten(2).contiguous()


def unpack4(data: UInt8[Tensor, "blocks steps 64"]) -> UInt8[Tensor, "rows inputs"]:
    """Unpack what `pack4` packed, with the padding."""
    x = torch.stack((data & 15, data >> 4), dim=2)  # [block, step, 2, 64]
    x = x.view(*x.shape[:3], BLOCK, 4).permute(0, 3, 1, 2, 4)  # [block, row, step, 2, 4]
    return x.reshape(data.shape[0] * BLOCK, -1)


def by_block(x: Tensor, fill: float = 0) -> Tensor:
    """Return values [out, group] of rows as [block, group, 16]."""
    x = functional.pad(x, (0, 0, 0, -x.shape[0] % BLOCK), value=fill)
    return x.view(-1, BLOCK, x.shape[1]).transpose(1, 2).contiguous()


def by_row(x: Tensor) -> Tensor:
    """Return values [block, group, 16] as [rows, group]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def block_bias(bias: Float[Tensor, " out"] | None) -> Float[Tensor, "blocks 16"] | None:
    """Return a bias as the kernels read it."""
    if bias is None:
        return None
    return functional.pad(bias.detach().float(), (0, -len(bias) % BLOCK)).view(-1, BLOCK)


_SMALLEST = 1e-30  # below this a group counts as zeros: 127 / max stays finite


def round_rows(
    x: Float[Tensor, "M K"], group_size: int
) -> tuple[Int[Tensor, "M groups group"], Float[Tensor, "M groups 1"]]:
    """Return activations as signed bytes, by token and group of inputs, and their scales.

    Source: as `quantize_group` of native/activations.h, bit for bit.
    """
    padded = pad_to(x.float(), 1, group_size, 0).view(len(x), -1, group_size)
    largest = padded.abs().amax(dim=-1, keepdim=True)
    empty = largest < _SMALLEST
    # A number over a tensor would be the number times a rounded reciprocal.
    factor = torch.where(empty, 0.0, torch.full_like(largest, 127.0) / largest)
    scale = torch.where(empty, 0.0, largest / 127.0)
    return (padded * factor).round().to(torch.int32), scale


def rounded(x: Float[Tensor, "M K"], group_size: int) -> Float[Tensor, "M K"]:
    """Return activations as the integer kernels see them."""
    values, scale = round_rows(x, group_size)
    return (values * scale).view(len(x), -1)[:, : x.shape[1]]
