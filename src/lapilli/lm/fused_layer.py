"""A decoder layer as one call (kernels/layer.py), as long as there is nothing special about it.

Special is everything that the call could not know of: an adapter, a hook, another activation,
another number format, weights that were moved. Looked at before every call, in microseconds.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lapilli.kernels.layer import PRODUCTS, WIDTH_STEP, LayerKernel, PlainLinear
from lapilli.kernels.library import native
from lapilli.kernels.linear import PackedLinear
from lapilli.nn.linear import FEW, FloatLinear, KernelLayer
from lapilli.nn.norm import RMSNorm
from lapilli.nn.paged import PagedBatch
from lapilli.shapes import Float, Tensor

MOST = {PackedLinear: 64, PlainLinear: 2 * FEW}
"""Positions up to which the call is not slower than layer by layer: plain weights have better
products for many rows (nn/linear.py)."""

RotaryTables = tuple[Float[Tensor, "B 1 T A"], Float[Tensor, "B 1 T A"]]


class FusedLayer:
    """The call for one layer, and what has to stay as it is for it.

    Holds no weight that the layer does not hold: what somebody replaces goes at once.

    Args:
        layer: with input_layernorm, self_attn, post_attention_layernorm and mlp.
    """

    def __init__(self, layer: Any) -> None:  # noqa: ANN401 - a DecoderLayer, which imports this
        self._layer = layer
        self._made: _Made | None = None
        self._seen_with: tuple[object, _Made] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: addresses are made anew."""
        return {"_layer": self._layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_layer"])  # type: ignore[misc]  # a copy begins as a new one does

    def run(
        self, x: Float[Tensor, "B T D"], table: RotaryTables, cache: object, *, index: int
    ) -> Float[Tensor, "B T D"] | None:
        """Hidden states after the layer; None where it has to be run module by module."""
        if not isinstance(cache, PagedBatch) or torch.is_grad_enabled() or x.shape[0] != 1:
            return None
        places = cache.places
        if places is None or x.dtype != torch.float32 or not x.is_contiguous():
            return None
        made = self._current(cache.unchanged)
        if made is None or x.shape[1] > made.most or any(map(_Part.is_hooked, made.parts)):
            return None
        return made.kernel(x, table, cache.memory(index), places)

    def _current(self, unchanged: object | None) -> "_Made | None":
        """The call for the parts of now; not looked at again where somebody watches them.

        Threads and interrupts may come between any two lines: what was made, and with what it was
        seen, are replaced as wholes, and the second says for which of the first it holds.
        """
        made, seen = self._made, self._seen_with
        if made is not None and seen is not None and unchanged is seen[0] and made is seen[1]:
            return made
        if made is None or not all(map(_Part.is_same, made.parts)):
            made = self._made = self._make()
        self._seen_with = None if made is None or unchanged is None else (unchanged, made)
        return made

    def _make(self) -> "_Made | None":
        """The call for the modules of now; None where they are not of the plain kind."""
        layer, library = self._layer, native()
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        parts = [getattr(attention, f"{name}_proj") for name in PRODUCTS[:4]]
        parts += [getattr(mlp, f"{name}_proj") for name in PRODUCTS[4:]]
        found = [one for one in map(_product_of, parts) if one is not None]
        width = attention.head_dim
        if (
            library is None
            or width % WIDTH_STEP
            or type(mlp.act) is not nn.SiLU
            or not all(type(one) is RMSNorm and _is_plain(one.weight) for one in norms)
            or len(found) != len(parts)
        ):
            return None
        if not (_are_alike(found[:3]) and _are_alike(found[4:6]) and _agree(found)):
            return None
        watched = [_Part(one) for one in (layer, attention, mlp, *norms, *parts)]
        kernel = LayerKernel(
            library,
            dict(zip(PRODUCTS, found, strict=True)),
            (norms[0].weight, norms[1].weight),
            eps=norms[0].eps,
            heads=parts[0].out_features // width,
            kv_heads=parts[1].out_features // width,
            width=width,
            window=attention.window,
        )
        return _Made(kernel, min(MOST[type(one)] for one in found), watched)


@dataclass(frozen=True, slots=True)
class _Made:
    """A call, the most positions it is for, and the modules that it was made of."""

    kernel: LayerKernel
    most: int
    parts: "list[_Part]"


class _Part:
    """A module as it was: its children, and where its tensors lie."""

    __slots__ = ("_children", "_module", "_tensors")

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._children = [
            None if child is None else weakref.ref(child) for child in module._modules.values()
        ]
        self._tensors = _addresses(module)

    def is_same(self) -> bool:
        """Whether nothing was replaced or moved."""
        module = self._module()
        if module is None or _addresses(module) != self._tensors:
            return False
        children = module._modules.values()
        return len(children) == len(self._children) and all(
            child is (held and held()) for child, held in zip(children, self._children, strict=True)
        )

    def is_hooked(self) -> bool:
        """Whether somebody wants to see or change what goes through."""
        module = self._module()
        return module is None or bool(module._forward_hooks or module._forward_pre_hooks)


def _addresses(module: nn.Module) -> list[int]:
    return [
        0 if tensor is None else tensor.data_ptr()
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
    ]


def _product_of(layer: nn.Module) -> PackedLinear | PlainLinear | None:
    if isinstance(layer, KernelLayer):
        kernel = layer.kernel()
        return None if kernel.library is None else kernel
    if type(layer) not in (nn.Linear, FloatLinear) or not isinstance(layer, nn.Linear):
        return None
    weight, bias = layer.weight, layer.bias
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.stride(1) != 1:
        return None
    if bias is not None and not _is_plain(bias):
        return None
    return PlainLinear(weight.detach(), None if bias is None else bias.detach())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _are_alike(products: Sequence[PackedLinear | PlainLinear]) -> bool:
    """Whether one call can meet them with the same input."""
    kinds = {one.kind if isinstance(one, PackedLinear) else None for one in products}
    return len(kinds) == 1


def _agree(products: Sequence[PackedLinear | PlainLinear]) -> bool:
    """Whether activations are rounded for all packed layers or for none."""
    return len({one.weight_only for one in products if isinstance(one, PackedLinear)}) < 2
