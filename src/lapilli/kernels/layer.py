"""A whole decoder layer for a few positions in one call of the library.

The operations are those of the other files of this room, in the order of lm/decoder.py and with the
same bits: what is saved is the way from one to the next, which costs a small model more than the
arithmetic of a token. The plain twin is the layer itself.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lapilli.kernels.library import KINDS, LayerCall, Library, Product
from lapilli.kernels.linear import PackedLinear
from lapilli.shapes import Float, Int, Tensor

PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "mlp", "attention_out", "mlp_out", "q", "k")
"""Of which only the first two are in every layer."""
WIDTH_STEP = 32
"""Head widths that the library rotates and reads are multiples of this."""


@dataclass(frozen=True, slots=True)
class Places:
    """Places of T new positions in a cache and what they see; the same for all layers of a pass.

    Attributes:
        blocks: of each position, int64.
        offsets: inside the block, int64.
        table: blocks of the row that each position is the last of, int32.
        lengths: of these rows, the position included, int32.
    """

    blocks: Int[Tensor, " T"]
    offsets: Int[Tensor, " T"]
    table: Int[Tensor, "T n"]
    lengths: Int[Tensor, " T"]


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A weight as torch has it, float32 or bfloat16, rows of any distance; bias in float32."""

    weight: Float[Tensor, "out K"]
    bias: Float[Tensor, " out"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """The settings of a layer besides its products.

    Attributes:
        heads: query heads.
        kv_heads: heads of keys and values.
        width: of a head, a multiple of WIDTH_STEP.
        window: of a sliding window, or None.
        scale: factor on the scores, 1 / sqrt(width) when None.
        softcap: c, where a score s becomes c tanh(s / c), or None.
        eps: of the norms.
        norm_offset: added to the weights of the norms.
        gelu: the MLP's activation is GELU by its tanh form, not SiLU.
    """

    heads: int
    kv_heads: int
    width: int
    window: int | None
    scale: float | None
    softcap: float | None
    eps: float
    norm_offset: float
    gelu: bool


class LayerKernel:
    """A layer described to the library once; any number of threads may call it.

    Plain weights are not kept: whoever calls knows that they are still where they were.

    Args:
        library: what runs it.
        products: PRODUCTS by name; q, k and v of one kind, gate and up likewise.
        norms: weights by the names of NORMS, float32.
        facts: about the arithmetic.
    """

    def __init__(
        self,
        library: Library,
        products: Mapping[str, PackedLinear | PlainLinear],
        norms: Mapping[str, Float[Tensor, " D"]],
        facts: LayerFacts,
    ) -> None:
        self._library = library
        self._kept = [one for one in products.values() if isinstance(one, PackedLinear)]
        self.is_packed = bool(self._kept)
        self._products = {name: _described(products[name]) for name in PRODUCTS}
        packed = [one for one in products.values() if isinstance(one, PackedLinear)]
        # Only read from now on: every call fills in a copy, so that threads do not meet in it.
        self._facts = LayerCall(
            **{f"{name}_norm": weight.data_ptr() for name, weight in norms.items()},
            **{name: ctypes.addressof(one) for name, one in self._products.items()},
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            width=facts.width,
            window=facts.window or 0,
            weight_only=int(any(one.weight_only for one in packed)),
            gelu=int(facts.gelu),
            scale=facts.width**-0.5 if facts.scale is None else facts.scale,
            eps=facts.eps,
            norm_offset=facts.norm_offset,
            softcap=facts.softcap or 0.0,
        )

    def __call__(
        self,
        x: Float[Tensor, "1 T D"],
        table: tuple[Float[Tensor, "1 1 T A"], Float[Tensor, "1 1 T A"]],
        memory: tuple[Float[Tensor, "N K P A"], Float[Tensor, "N K P A"]],
        places: Places,
    ) -> Float[Tensor, "1 T D"]:
        """Return the hidden states after the layer; new keys and values are in their places.

        Args:
            x: hidden states before, float32, contiguous.
            table: cosines and signed sines of the positions.
            memory: keys and values of this layer, float32 or bfloat16.
            places: of the positions in it.
        """
        call, y = LayerCall.from_buffer_copy(self._facts), torch.empty_like(x)
        keys, values = memory
        call.x, call.y = x.data_ptr(), y.data_ptr()
        call.cosine, call.sine = table[0].data_ptr(), table[1].data_ptr()
        call.keys, call.values = keys.data_ptr(), values.data_ptr()
        call.blocks, call.offsets = places.blocks.data_ptr(), places.offsets.data_ptr()
        call.table, call.lengths = places.table.data_ptr(), places.lengths.data_ptr()
        call.tokens = x.shape[1]
        call.block_size = keys.shape[2]
        call.table_stride = places.table.shape[1]
        call.block_stride, call.head_stride = keys.stride(0), keys.stride(1)
        call.kind = KINDS[keys.dtype]
        call.threads = torch.get_num_threads()
        self._library.functions.lapilli_layer(ctypes.byref(call))
        return y


def _described(layer: PackedLinear | PlainLinear) -> Product:
    if isinstance(layer, PackedLinear):
        packed = layer.packed
        return Product(
            packed=ctypes.addressof(layer.weights),
            rows=packed.out_features,
            inputs=packed.in_features,
        )
    weight, bias = layer.weight, layer.bias
    return Product(
        plain=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=weight.shape[0],
        inputs=weight.shape[1],
        stride=weight.stride(0),
        kind=KINDS[weight.dtype],
    )
