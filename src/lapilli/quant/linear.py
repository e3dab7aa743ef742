"""Quantized linear layers on a CPU and on a GPU, and vocabulary tables in the format of their file.

On a GPU, by operations that torch has; activations are not rounded there:

    4 bits, few rows    torch's int4 product over tiles: a second copy of the weight, made once
    8 bits, few rows    products and sums while torch compiles, fused with unpacking by the compiler
    else                the weight as floats, then an ordinary product

The same functions run on a CPU, where torch has a twin of the int4 product: so the tests can tell.
Tensors of layers are buffers, so that state_dict has them. Knows packed weights; no model.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from lapilli.errors import ConfigError
from lapilli.kernels.linear import PackedLinear
from lapilli.kernels.packing import (
    BLOCK,
    BYTE_ZERO,
    CHUNK,
    NIBBLE_ZERO,
    Packed,
    block_bias,
    by_row,
    unpack4,
    unpack8,
)
from lapilli.nn.linear import FrozenQuantizedLinear, KernelLayer
from lapilli.shapes import Float, Int, Tensor

MOST_TILED_ROWS = 128
"""Rows up to which the int4 product is used.

Source: the table of torchao's prototype/hqq (A6000, 4096 x 4096): at 128 rows as fast as making
floats first, at 256 slower, at 16 seven times as fast. Not measured here.
"""
MOST_SUMMED_ROWS = 16
"""Rows up to which 8 bits are read once as products and sums; beyond, arithmetic takes longer."""
_TILE_STEPS = (8, 4, 2)  # of 16 inputs, in one tile
_TENSOR_CORES = (8, 0)  # the compute capability from which there are bfloat16 ones


@dataclass(frozen=True, slots=True, eq=False)
class Int4Tiles:
    """A 4-bit weight as torch's int4 product takes it.

    Attributes:
        tiles: opaque, in the layout of the device.
        scales_and_zeros: Float[K / group, rows, 2]: w = (nibble - 8) * scale + zero.
        group_size: inputs that share them.
        source: the packed tensor that this was made of.
    """

    tiles: Tensor
    scales_and_zeros: Float[Tensor, "groups rows 2"]
    group_size: int
    source: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the activations that it multiplies."""
        return self.scales_and_zeros.dtype

    def product(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M rows"]:
        """Return the product, rows of padding included; bfloat16 on a GPU."""
        takes = (x.contiguous(), self.tiles, self.group_size, self.scales_and_zeros)
        ops = torch.ops.aten
        on_cpu = x.device.type == "cpu"
        multiply = ops._weight_int4pack_mm_for_cpu if on_cpu else ops._weight_int4pack_mm
        out: Tensor = multiply.default(*takes)
        return out


def int4_tiles(packed: Packed, dtype: torch.dtype) -> Int4Tiles | None:
    """Return tiles of a weight for activations of a dtype; None where torch has no product."""
    width, device = packed.in_features, packed.data.device
    steps = next((n for n in _TILE_STEPS if width % (16 * n) == 0), None)
    group_size = packed.group_size
    if packed.bits != 4 or packed.span_scales is not None or steps is None or width % group_size:
        return None  # torch's product has linear levels
    if device.type == "cuda" and not (dtype == torch.bfloat16 and has_bfloat16_cores(device)):
        return None
    values = unpack4(packed.data)[:, :width]
    if device.type == "cpu":
        tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(values.int(), steps)
    else:
        # Two inputs in a byte, the first one in its upper half.
        pairs = (values[:, ::2] << 4) | values[:, 1::2]
        tiles = torch.ops.aten._convert_weight_to_int4pack.default(pairs.contiguous(), steps)
    return Int4Tiles(tiles, scales_and_zeros(packed, dtype), group_size, packed.data)


def scales_and_zeros(packed: Packed, dtype: torch.dtype) -> Float[Tensor, "groups rows 2"]:
    """Return (nibble - zero) * scale said as (nibble - 8) * scale + (8 - zero) * scale."""
    scales = by_row(packed.scales).float()
    if packed.zeros is None:
        shift = torch.zeros_like(scales)
    else:
        shift = (NIBBLE_ZERO - by_row(packed.zeros).float()) * scales
    return torch.stack((scales, shift), dim=-1).transpose(0, 1).to(dtype).contiguous()


def has_bfloat16_cores(device: torch.device) -> bool:
    """Return whether a GPU multiplies bfloat16 in hardware."""
    return torch.cuda.get_device_capability(device) >= _TENSOR_CORES


def gpu_linear(
    x: Float[Tensor, "... K"], packed: Packed, tiles: Int4Tiles | None
) -> Float[Tensor, "... out"]:
    """Return the layer's output in the dtype of x; `tiles` are the weight's, where it has any.

    Raises:
        ConfigError: a gradient is wanted.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            "quantized layers have no gradients on a GPU either: run under torch.no_grad()"
        )
    rows = x.reshape(-1, packed.in_features)
    count = rows.shape[0]
    if tiles is not None and tiles.dtype == x.dtype and count <= MOST_TILED_ROWS:
        out = tiles.product(rows)[:, : packed.out_features]
    elif packed.bits == 8 and count <= MOST_SUMMED_ROWS and torch.compiler.is_compiling():
        out = summed8(rows, packed)
    else:
        out = functional.linear(rows, float_weight(packed, x.dtype))
        if packed.bits == 8:
            out = out * packed.scales.view(-1)[: packed.out_features].to(x.dtype)
    bias = packed.plain_bias
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.view(*x.shape[:-1], packed.out_features)


def float_weight(packed: Packed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Return the weight in floats; 8 bits without their scales, so that nothing is rounded."""
    if packed.bits == 4:
        return packed.dequantize().to(dtype)
    values = unpack8(packed.data)[: packed.out_features, : packed.in_features]
    return values.to(dtype) - BYTE_ZERO


def summed8(x: Float[Tensor, "M K"], packed: Packed) -> Float[Tensor, "M out"]:
    """Return the product with an 8-bit weight as products and sums, in float32.

    For a compiler: it makes one kernel of it that reads the packed bytes where they lie, where a
    matrix product would need the weight unpacked in memory first.
    """
    padded = functional.pad(x.float(), (0, -packed.in_features % CHUNK))
    parts = padded.view(len(x), 1, -1, 1, 4)
    values = packed.data.view(*packed.data.shape[:2], BLOCK, 4).float() - BYTE_ZERO
    sums = (parts * values).sum(dim=(2, 4)) * packed.scales  # [M, block, 16]
    return sums.view(len(x), -1)[:, : packed.out_features].to(x.dtype)


class QuantLinear(KernelLayer, FrozenQuantizedLinear):
    """A linear layer, W x + b, with W in 4 or 8 bits.

    Attributes:
        qweight: packed integers (kernels/packing.py).
        scales: of groups or rows.
        zeros: what zero is stored as, by group; None: the middle.
        span_scales: of nonlinear levels, or None.
        packed_bias: by block of 16 rows, or None.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    span_scales: Tensor | None
    packed_bias: Tensor | None

    def __init__(self, packed: Packed, *, weight_only: bool = False) -> None:
        super().__init__()
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.group_size = packed.group_size
        self.bits: int = packed.bits
        self.weight_only = weight_only
        self.register_buffer("qweight", packed.data)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        self.register_buffer("span_scales", packed.span_scales)
        self.register_buffer("packed_bias", packed.bias)
        self._ready: PackedLinear | None = None
        self._tiles: Int4Tiles | None = None

    @property
    def packed(self) -> Packed:
        """Return the weight as the kernels take it."""
        return Packed(
            self.qweight,
            self.scales,
            self.zeros,
            self.packed_bias,
            self.out_features,
            self.in_features,
            self.group_size,
            self.bits,
            self.span_scales,
        )

    def set_bias(self, bias: Float[Tensor, " out"] | None) -> None:
        """Add a bias to the output from now on."""
        self.packed_bias = block_bias(bias)
        self._ready = None

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """Return the layer's output in the dtype of x.

        Where a gradient of x is wanted, of exactly the packed weight: nothing is rounded on the
        fly.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return self.product(x)
        if x.device.type == "cuda":
            return self.on_gpu(x)
        if torch.compiler.is_compiling():
            sizes = [self.out_features, self.in_features, self.group_size, self.bits]
            parts = (self.qweight, self.scales, self.zeros, self.span_scales, self.packed_bias)
            out: Tensor = torch.ops.lapilli.linear(x, *parts, sizes, self.weight_only)
            return out
        return self.kernel()(x)

    def weight_rows(self, start: int, stop: int) -> Float[Tensor, "rows in"]:
        """Return rows of W in float32, see FrozenQuantizedLinear."""
        blocks, spans = slice(start // BLOCK, -(-stop // BLOCK)), self.span_scales
        part = replace(
            self.packed,
            data=self.qweight[blocks],
            scales=self.scales[blocks],
            zeros=None if self.zeros is None else self.zeros[blocks],
            span_scales=None if spans is None else spans[blocks],
            bias=None,
            out_features=stop - start,
        )
        return part.dequantize()

    @property
    def plain_bias(self) -> Float[Tensor, " out"] | None:
        """Return the bias without padding."""
        return self.packed.plain_bias

    def kernel(self) -> PackedLinear:
        """Return the weight ready to be called, made once."""
        ready = self._ready
        if ready is None or ready.packed.data is not self.qweight:
            ready = self._ready = PackedLinear(self.packed, weight_only=self.weight_only)
        return ready

    def on_gpu(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """Compute `forward` by `gpu_linear`, whatever the device.

        The tiles are made in the first call, which is not one that is compiled or recorded: the
        engine reads a prompt before it gives a token.
        """
        tiles = self._tiles
        if not torch.compiler.is_compiling() and (
            tiles is None or tiles.source is not self.qweight
        ):
            tiles = self._tiles = int4_tiles(self.packed, x.dtype)
        return gpu_linear(x, self.packed, tiles)

    def extra_repr(self) -> str:
        """Return sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, group_size={self.group_size}, bias={self.packed_bias is not None}"
        )


class StoredEmbedding(nn.Module):
    """A float16 or bfloat16 table whose rows are handed out in another format.

    Only a few rows of the table are ever read, so it may stay a view of its file: half the memory,
    and exactly the numbers that a converted table would give.

    Attributes:
        dtype: of what comes out; the kernels of packed layers compute in float32.
    """

    weight: Tensor
    dtype = torch.float32

    def __init__(self, weight: Float[Tensor, "V D"]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Return the vectors of token ids."""
        return functional.embedding(ids, self.weight).to(self.dtype)
