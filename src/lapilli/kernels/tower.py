"""A layer of a vision transformer in one call: norms, products, attention, activation, residuals.

What comes out of a product goes through the next operation before it leaves the cache, and the
weights stay where they are: nothing is copied, nothing is kept.

    float32     everything in float32
    bfloat16    products and attention of bfloat16 pairs, summed in float32; the rest in float32
    int8        packed weights, rows rounded as for PackedLinear; attention of bfloat16 pairs

CPUs without products of bfloat16 take float32 for them. The plain twin is the layer module by
module (modality/image/image.py).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lapilli.kernels.layer import PlainLinear
from lapilli.kernels.library import KINDS, Library, Product, TowerCall, address
from lapilli.kernels.linear import PackedLinear
from lapilli.shapes import Float, Tensor

WIDTH_STEP = 16
"""Widths of heads and of products are multiples of this."""
ACTIVATIONS = {"quick_gelu": 0, "gelu_tanh": 1, "gelu": 2}
"""Activations of native/abi.h."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerFacts:
    """The settings of a layer besides its products.

    Attributes:
        norms: weight and bias of the norm before attention and of the one before the MLP.
        heads: of attention.
        activation: of the MLP, one of ACTIVATIONS.
        eps: of the norms.
    """

    norms: tuple[Tensor, Tensor, Tensor, Tensor]
    heads: int
    activation: str
    eps: float


def multiplies_pairs(library: Library) -> bool:
    """Return whether products of bfloat16 are made of bfloat16 here, and not of float32."""
    return bool(library.functions.lapilli_has_pairs())


def tower_layer(
    library: Library,
    x: Float[Tensor, "N P E"],
    products: Sequence[PackedLinear | PlainLinear],
    facts: TowerFacts,
) -> Float[Tensor, "N P E"]:
    """Return the hidden states after a layer, in the dtype of x.

    Args:
        library: what computes it.
        x: hidden states before, float32 or bfloat16.
        products: q, k, v, out, fc1, fc2: all packed in 8 bits with float32 activations rounded on
            the fly, or all plain in the dtype of x.
        facts: what else a layer has.
    """
    seen = x.float().contiguous()
    norms = [part.float().contiguous() for part in facts.norms]
    kept = [_described(product) for product in products]
    out = torch.empty_like(seen)
    first = products[0]
    packed = isinstance(first, PackedLinear)
    rows = first.packed.out_features if isinstance(first, PackedLinear) else first.weight.shape[0]
    width = rows // facts.heads
    call = TowerCall(
        *[norm.data_ptr() for norm in norms],
        *[ctypes.addressof(product) for product, _ in kept],
        seen.data_ptr(),
        out.data_ptr(),
        tiles=x.shape[0],
        positions=x.shape[1],
        heads=facts.heads,
        width=width,
        kind=KINDS[torch.int8 if packed else x.dtype],
        activation=ACTIVATIONS[facts.activation],
        threads=torch.get_num_threads(),
        scale=width**-0.5,
        eps=facts.eps,
    )
    library.functions.lapilli_tower(ctypes.byref(call))
    return out.to(x.dtype)


def _described(product: PackedLinear | PlainLinear) -> tuple[Product, Tensor | None]:
    """Describe a product to the library; with what has to outlive the description."""
    if isinstance(product, PackedLinear):
        packed = product.packed
        described = Product(
            packed=ctypes.addressof(product.weights),
            rows=packed.out_features,
            inputs=packed.in_features,
        )
        return described, None
    weight = product.weight
    bias = None if product.bias is None else product.bias.float().contiguous()
    described = Product(
        plain=weight.data_ptr(),
        bias=address(bias),
        rows=weight.shape[0],
        inputs=weight.shape[1],
        stride=weight.stride(0),
        kind=KINDS[weight.dtype],
    )
    return described, bias
