"""Packed layout of quantized weights (native/abi.h draws it) and rounding of activations.

    data    UInt8[block, input / 4 | input / 8, 64]     16 output rows a block, inputs padded to 32
    scales  float16 [block, group, 16] at 4 bits        float32 [block, 16] at 8 bits
    zeros   UInt8[block, group, 16] or None (8)         bias float32 [block, 16] or None

4 bits with nonlinear levels: every span of 16 inputs of a row has a signed scale of 8 bits, so that
a weight is scales * span_scales * LEVELS[nibble], and products stay integers over a group:

    scales  float32 [block, 16]          span_scales  Int8[block, span, 16]

That is 4.5 bits a weight; `group_size` is of the activations alone. One layout for every
instruction set, so that packed files fit every machine.
"""

from dataclasses import dataclass
from functools import partial

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
SPAN = 16
"""Inputs that share a scale of nonlinear levels."""
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The nonlinear levels of a nibble, closer to each other near zero, where most weights are.

Source: IQ4_NL of ggml, whose files hold the same numbers; native/abi.h has them again.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The weight [out_features, in_features] of a linear layer, packed.

    Attributes:
        data: see the head of this file.
        scales: of groups of weights (4 bits), or of output rows (8 bits and nonlinear levels).
        zeros: what zero is stored as, by group; None: 8 at 4 bits, 128 at 8.
        bias: added to the output.
        out_features: rows before padding.
        in_features: inputs before padding.
        group_size: inputs that share a scale, of the weights (4 bits) and of the activations.
        bits: 4 or 8.
        span_scales: of nonlinear levels; None: a weight is scale * (n - zero).
    """

    data: UInt8[Tensor, "blocks steps 64"]
    scales: Tensor
    zeros: UInt8[Tensor, "blocks groups 16"] | None
    bias: Float[Tensor, "blocks 16"] | None
    out_features: int
    in_features: int
    group_size: int
    bits: int
    span_scales: Int8[Tensor, "blocks spans 16"] | None = None

    def __post_init__(self) -> None:
        blocks, padded = -(-self.out_features // BLOCK), -(-self.in_features // CHUNK) * CHUNK
        groups = -(-padded // self.group_size)
        _check("data", self.data, (blocks, padded * self.bits // 32, 64), torch.uint8)
        if self.span_scales is not None:
            shape = (blocks, padded // SPAN, BLOCK)
            _check("span_scales", self.span_scales, shape, torch.int8)
        if self.bits == 4 and self.span_scales is None:
            _check("scales", self.scales, (blocks, groups, BLOCK), torch.float16)
        else:
            _check("scales", self.scales, (blocks, BLOCK), torch.float32)
        if self.zeros is not None:
            _check("zeros", self.zeros, (blocks, groups, BLOCK), torch.uint8)
        if self.bias is not None:
            _check("bias", self.bias, (blocks, BLOCK), torch.float32)

    @property
    def num_bytes(self) -> int:
        """Return the size in memory."""
        parts = (self.data, self.scales, self.zeros, self.bias, self.span_scales)
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
        if self.span_scales is not None:
            table = torch.tensor(LEVELS, dtype=torch.float32, device=self.data.device)
            spans = table[unpack4(self.data).long()].view(self.data.shape[0] * BLOCK, -1, SPAN)
            spans *= by_row(self.span_scales).float()[..., None]
            values = spans.flatten(1).mul_(self.scales.view(-1, 1))
            return values[: self.out_features, : self.in_features]
        values = unpack4(self.data).float()
        padded = values.shape[1]
        scales = by_row(self.scales).float().repeat_interleave(self.group_size, dim=1)
        zeros: Tensor | int = NIBBLE_ZERO
        if self.zeros is not None:
            zeros = by_row(self.zeros).float().repeat_interleave(self.group_size, dim=1)
            zeros = zeros[:, :padded]
        values = (values - zeros) * scales[:, :padded]
        return values[: self.out_features, : self.in_features]


def empty_packed(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    *,
    levels: str = "symmetric",
    has_bias: bool = False,
    device: torch.device | None = None,
) -> Packed:
    """Return packed tensors of the shapes of a weight, without values.

    Args:
        out_features: rows of the weight.
        in_features: its columns.
        bits: 4 or 8.
        group_size: see `Packed`.
        levels: of 4 bits: nonlinear, symmetric or zeros.
        has_bias: whether there is one.
        device: where they lie.
    """
    blocks, padded = -(-out_features // BLOCK), -(-in_features // CHUNK) * CHUNK
    of_groups, of_rows = (blocks, -(-padded // group_size), BLOCK), (blocks, BLOCK)
    empty = partial(torch.empty, device=device)
    is_nonlinear = bits == 4 and levels == "nonlinear"
    by_row = bits == 8 or is_nonlinear
    return Packed(
        empty((blocks, padded * bits // 32, 64), dtype=torch.uint8),
        empty(of_rows, dtype=torch.float32) if by_row else empty(of_groups, dtype=torch.float16),
        empty(of_groups, dtype=torch.uint8) if bits == 4 and levels == "zeros" else None,
        empty(of_rows, dtype=torch.float32) if has_bias else None,
        out_features,
        in_features,
        group_size,
        bits,
        empty((blocks, padded // SPAN, BLOCK), dtype=torch.int8) if is_nonlinear else None,
    )


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
