"""Quantized linear layers, and vocabulary tables in the number format of their file.

Their tensors are buffers, so that state_dict has them.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from lapilli.kernels.linear import PackedLinear
from lapilli.kernels.packing import BLOCK, CHUNK, Packed, block_bias
from lapilli.nn.linear import FrozenQuantizedLinear, KernelLayer
from lapilli.quant.cuda import Int4Tiles, gpu_linear, int4_tiles
from lapilli.shapes import Float, Int, Tensor


def empty_packed(linear: nn.Linear, bits: int, group_size: int, *, symmetric: bool) -> Packed:
    """Return packed tensors of the shapes of a layer's weight, on its device, without values."""
    blocks = -(-linear.out_features // BLOCK)
    padded = -(-linear.in_features // CHUNK) * CHUNK
    groups = -(-padded // group_size)
    device = linear.weight.device
    has_zeros = bits == 4 and not symmetric
    return Packed(
        torch.empty((blocks, padded * bits // 32, 64), dtype=torch.uint8, device=device),
        torch.empty((blocks, groups, BLOCK), dtype=torch.float16, device=device)
        if bits == 4
        else torch.empty((blocks, BLOCK), dtype=torch.float32, device=device),
        torch.empty((blocks, groups, BLOCK), dtype=torch.uint8, device=device)
        if has_zeros
        else None,
        None
        if linear.bias is None
        else torch.empty((blocks, BLOCK), dtype=torch.float32, device=device),
        linear.out_features,
        linear.in_features,
        group_size,
        bits,
    )


class QuantLinear(KernelLayer, FrozenQuantizedLinear):
    """A linear layer, W x + b, with W in 4 or 8 bits.

    Attributes:
        qweight: packed integers (kernels/packing.py).
        scales: of groups or rows.
        zeros: what zero is stored as, by group; None: the middle.
        packed_bias: by block of 16 rows, or None.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
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
            out: Tensor = torch.ops.lapilli.linear(
                x, self.qweight, self.scales, self.zeros, self.packed_bias, sizes, self.weight_only
            )
            return out
        return self.kernel()(x)

    def weight_rows(self, start: int, stop: int) -> Float[Tensor, "rows in"]:
        """Return rows of W in float32, see FrozenQuantizedLinear."""
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        part = replace(
            self.packed,
            data=self.qweight[blocks],
            scales=self.scales[blocks],
            zeros=None if self.zeros is None else self.zeros[blocks],
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
        """Compute `forward` by operations of torch (quant/cuda.py), whatever the device.

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
