"""Small operations between the products (norm, gate, rotation), and whole layers in one call.

Each small operation has a plain-torch reference, and a native path for float32 on a CPU where no
gradient is wanted: torch takes several passes over its rows for each, which costs more than the
arithmetic of one token. The layer in one call does the same for a few positions, in the order of
lm/decoder.py and with the same bits: what is saved is the way from one operation to the next, which
costs a small model more than the arithmetic of a token. Its plain twin is the layer itself. All
layers of a decoder in one call are the same call for each of them, with threads that stand by.

    torch.ops.lapilli.rms_norm, silu_mul, rotate     for programs that trace without a compiler

While torch compiles, plain torch is called and not these ops: a compiler fuses it with what is
around, which an op would prevent (three layers of width 256 take 1.6 times as long with the ops, of
width 1024 1.05 times).
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from lapilli.kernels.library import (
    KINDS,
    LayerCall,
    Library,
    Product,
    RotateCall,
    RowsCall,
    StepCall,
    address,
    native,
)
from lapilli.kernels.linear import PackedLinear
from lapilli.shapes import Float, Int, Tensor

WIDTH_STEP = 32
"""Head widths that the library rotates, in a layer and alone, are multiples of this."""


def _library(*tensors: Tensor) -> Library | None:
    """Return the library, where it can stand in for torch on these tensors."""
    if torch.compiler.is_compiling():
        return None
    needs_gradient = torch.is_grad_enabled()
    for x in tensors:
        fits = x.dtype == torch.float32 and x.device.type == "cpu"
        if not fits or (needs_gradient and x.requires_grad):
            return None
    return native()


def rms_norm_reference(
    x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float, offset: float = 0.0
) -> Float[Tensor, "... D"]:
    """Compute the same as `rms_norm` in plain torch, statistics in float32."""
    normed = functional.rms_norm(x.float(), weight.shape, None, eps)
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def rms_norm(
    x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float, offset: float = 0.0
) -> Float[Tensor, "... D"]:
    """Scale the last axis to a root mean square of one, times offset + weight.

    Without an offset the product is taken in the dtype of x, as in the Llama reference, with one in
    float32, as in Gemma's.
    """
    library = _library(x, weight)
    if library is None or not weight.is_contiguous():
        return rms_norm_reference(x, weight, eps, offset)
    function, width = library.functions.lapilli_rms_norm, x.shape[-1]
    return _rows(function, x, weight, width=width, eps=eps, offset=offset)


def silu_mul_reference(
    gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """Compute the same as `silu_mul` in plain torch."""
    return functional.silu(gate) * up


def silu_mul(gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Return silu(gate) * up, element by element."""
    library = _library(gate, up)
    if library is None or gate.shape != up.shape:
        return silu_mul_reference(gate, up)
    return _gated(library.functions.lapilli_silu_mul, gate, up)


def gelu_mul_reference(
    gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """Compute the same as `gelu_mul` in plain torch."""
    return functional.gelu(gate, approximate="tanh") * up


def gelu_mul(gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Return gelu(gate) * up, element by element, by the tanh form of GELU."""
    library = _library(gate, up)
    if library is None or gate.shape != up.shape:
        return gelu_mul_reference(gate, up)
    return _gated(library.functions.lapilli_gelu_mul, gate, up)


def _gated(function: Callable[[object], None], gate: Tensor, up: Tensor) -> Tensor:
    return _rows(function, gate, up.contiguous(), width=max(gate.shape[-1], 1))


def _rows(
    function: Callable[[object], None],
    x: Tensor,
    other: Tensor,
    *,
    width: int,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    call = RowsCall(
        x=x.data_ptr(),
        other=other.data_ptr(),
        y=out.data_ptr(),
        rows=x.numel() // width,
        width=width,
        x_stride=width,
        threads=torch.get_num_threads(),
        eps=eps,
        offset=offset,
    )
    function(ctypes.byref(call))
    return out


def rotate_reference(
    x: Float[Tensor, "B heads T A"],
    cos: Float[Tensor, "B 1 T A"],
    signed_sin: Float[Tensor, "B 1 T A"],
) -> Float[Tensor, "B heads T A"]:
    """Compute the same as `rotate` in plain torch.

    Rolling by half a head and a signed sine do the work of the textbook's negate-and-concatenate
    in three operations instead of five, with the same roundings.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def rotate(
    x: Float[Tensor, "B heads T A"],
    cos: Float[Tensor, "B 1 T A"],
    signed_sin: Float[Tensor, "B 1 T A"],
) -> Float[Tensor, "B heads T A"]:
    """Turn each pair (i, i + A/2) of a head by the angle of its position.

    The first half of `signed_sin` carries the minus of the rotation.
    """
    library = _library(x, cos, signed_sin)
    batch, heads, length, width = x.shape
    if library is None or width % WIDTH_STEP or x.stride(-1) != 1:
        return rotate_reference(x, cos, signed_sin)
    cos, signed_sin = cos.contiguous(), signed_sin.contiguous()
    out = torch.empty_like(x)
    call = RotateCall(
        x=x.data_ptr(),
        cosine=cos.data_ptr(),
        sine=signed_sin.data_ptr(),
        y=out.data_ptr(),
        rows=batch,
        heads=heads,
        positions=length,
        width=width,
        x_row=x.stride(0),
        x_head=x.stride(1),
        x_position=x.stride(2),
        y_row=out.stride(0),
        y_head=out.stride(1),
        y_position=out.stride(2),
        threads=torch.get_num_threads(),
    )
    library.functions.lapilli_rotate(ctypes.byref(call))
    return out


PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "mlp", "attention_out", "mlp_out", "q", "k")
"""Of which only the first two are in every layer."""


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
        products: PRODUCTS by name; q, k and v all packed or none, gate and up likewise.
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
        self.library = library
        self._packed = [one for one in products.values() if isinstance(one, PackedLinear)]
        self.is_packed = bool(self._packed)
        self._products = {name: _described(products[name]) for name in PRODUCTS}
        # Only read from now on: every call fills in a copy, so that threads do not meet in it.
        self.description = LayerCall(
            **{f"{name}_norm": weight.data_ptr() for name, weight in norms.items()},
            **{name: ctypes.addressof(one) for name, one in self._products.items()},
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            width=facts.width,
            window=facts.window or 0,
            weight_only=int(any(one.weight_only for one in self._packed)),
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
        call, y = LayerCall.from_buffer_copy(self.description), torch.empty_like(x)
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
        self.library.functions.lapilli_layer(ctypes.byref(call))
        return y


Memory = tuple[Float[Tensor, "N K P A"], Float[Tensor, "N K P A"]]
Table = tuple[Float[Tensor, "1 1 T A"], Float[Tensor, "1 1 T A"]]


class StepKernel:
    """The layers of a decoder, one after the other; any number of threads may call it.

    Args:
        layers: the first one first; all of one library. Who calls keeps them.
        local: whether the second of two rotary tables turns a layer.
    """

    def __init__(self, layers: Sequence[LayerKernel], local: Sequence[bool]) -> None:
        self._library = layers[0].library
        self._descriptions = (LayerCall * len(layers))(*[layer.description for layer in layers])
        self._local = (ctypes.c_uint8 * len(layers))(*local)

    def __call__(
        self,
        x: Float[Tensor, "1 T D"],
        tables: tuple[Table, Table],
        memory: Sequence[Memory],
        places: Places,
    ) -> Float[Tensor, "1 T D"]:
        """Return the hidden states after the last layer; new keys and values are in their places.

        Args:
            x: hidden states before, float32, contiguous.
            tables: see `LayerKernel`, for layers that are not local and for local ones.
            memory: of every layer, of one shape and dtype.
            places: of the positions in it.
        """
        y, count = torch.empty_like(x), len(self._descriptions)
        pointers = ctypes.c_void_p * count
        all_keys = pointers(*[one.data_ptr() for one, _ in memory])
        all_values = pointers(*[one.data_ptr() for _, one in memory])
        keys = memory[0][0]
        (cosine, sine), (local_cosine, local_sine) = tables
        call = StepCall(
            x=x.data_ptr(),
            y=y.data_ptr(),
            cosine=cosine.data_ptr(),
            local_cosine=local_cosine.data_ptr(),
            sine=sine.data_ptr(),
            local_sine=local_sine.data_ptr(),
            keys=ctypes.addressof(all_keys),
            values=ctypes.addressof(all_values),
            local=ctypes.addressof(self._local),
            blocks=places.blocks.data_ptr(),
            offsets=places.offsets.data_ptr(),
            table=places.table.data_ptr(),
            lengths=places.lengths.data_ptr(),
            layers=count,
            tokens=x.shape[1],
            block_size=keys.shape[2],
            table_stride=places.table.shape[1],
            block_stride=keys.stride(0),
            head_stride=keys.stride(1),
            kind=KINDS[keys.dtype],
            threads=torch.get_num_threads(),
        )
        self._library.functions.lapilli_step(ctypes.byref(call), ctypes.byref(self._descriptions))
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
        bias=address(bias),
        rows=weight.shape[0],
        inputs=weight.shape[1],
        stride=weight.stride(0),
        kind=KINDS[weight.dtype],
    )


@torch.library.custom_op("lapilli::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run `rms_norm` as an op."""
    return rms_norm(x, weight, eps).contiguous()


@rms_norm_op.register_fake
def _rms_norm_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lapilli::silu_mul", mutates_args=())
def silu_mul_op(gate: Tensor, up: Tensor) -> Tensor:
    """Run `silu_mul` as an op."""
    return silu_mul(gate, up).contiguous()


@silu_mul_op.register_fake
def _silu_mul_fake(gate: Tensor, _: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("lapilli::rotate", mutates_args=())
def rotate_op(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Run `rotate` as an op."""
    return rotate(x, cos, signed_sin).contiguous()


@rotate_op.register_fake
def _rotate_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
