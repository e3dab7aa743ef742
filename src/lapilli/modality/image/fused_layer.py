"""A layer of the vision tower as one call (kernels/tower.py), unless something about it is special.

Special is everything that the call could not know of: a hook, an adapter, gradients, a mode that
looks on, another activation, a weight of another number format. Looked at before every call, in
microseconds. The call is the layer written a second time: for every new set of modules and weights
it is compared with the modules once, on a few positions, and left where they differ.

Packed layers of 8 bits always take it; layers of floats where somebody has measured that it is
faster (quant/autotune.py), since other libraries have products of floats too.
"""

import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lapilli.kernels.layer import PlainLinear
from lapilli.kernels.library import Library, native
from lapilli.kernels.linear import PackedLinear
from lapilli.kernels.tower import WIDTH_STEP, TowerFacts, tower_layer
from lapilli.nn.layers import MLP, QuickGELU, is_gelu_tanh
from lapilli.nn.linear import FloatLinear, KernelLayer
from lapilli.shapes import Float, Tensor

LOG = logging.getLogger(__name__)
PRODUCTS = ("q_proj", "k_proj", "v_proj", "out_proj")
_CHILDREN = {
    "": {"layer_norm1", "self_attn", "layer_norm2", "mlp"},
    "self_attn": set(PRODUCTS),
    "mlp": {"fc1", "fc2", "act"},
}
_MOST_APART = 0.05
"""Share of what a layer adds by which the call may differ: bfloat16 and int8 are rounded at other
places, a step that is missing changes everything."""


_Marks = tuple[object, ...]


class FusedVisionLayer:
    """The call for one layer, and what it was compared with.

    Attributes:
        takes_floats: whether layers of floats take it too.

    Args:
        layer: a VisionLayer.
    """

    def __init__(self, layer: Any) -> None:  # noqa: ANN401 - a VisionLayer, which imports this
        self._layer = layer
        self._compared: tuple[list[_Marks], bool] | None = None
        self.takes_floats = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was compared: copies compare anew."""
        return {"_layer": self._layer, "takes_floats": self.takes_floats}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_layer"])  # type: ignore[misc]  # a copy begins as a new one does
        self.takes_floats = state["takes_floats"]

    def run(self, x: Float[Tensor, "N P E"]) -> Float[Tensor, "N P E"] | None:
        """Return the hidden states after the layer; None where it runs module by module."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_watched():
            return None
        library = native()
        if library is None or x.device.type != "cpu" or x.dim() != 3 or not x.numel():
            return None
        products = _products_of(self._layer, x.dtype)
        if products is None or not (self.takes_floats or isinstance(products[0], PackedLinear)):
            return None
        facts = _facts_of(self._layer)
        if facts is None or not self._agrees(library, products, facts, x):
            return None
        return tower_layer(library, x, products, facts)

    def _agrees(
        self,
        library: Library,
        products: "list[PackedLinear | PlainLinear]",
        facts: TowerFacts,
        x: Tensor,
    ) -> bool:
        """Compare the call with the modules, unless these very ones were compared already."""
        modules = [module for module in self._layer.modules() if module is not self._layer]
        now = [_marks(module) for module in modules]
        compared = self._compared
        if compared is not None and compared[0] == now:
            return compared[1]
        random = torch.Generator().manual_seed(0)
        # Small, so that the residual's last bits do not count as a difference.
        tried = 0.05 * torch.randn(1, 7, x.shape[2], generator=random)
        tried = tried.to(x.dtype)
        expected = self._layer.by_modules(tried).float()
        found = tower_layer(library, tried, products, facts).float()
        added = (expected - tried.float()).norm().clamp(min=1e-30)
        apart = float((found - expected).norm() / added)
        agree = bool(apart <= _MOST_APART)
        if apart > _MOST_APART:  # weights that are no numbers prove nothing
            _report(apart)
        self._compared = (now, agree)
        return agree


def _is_watched() -> bool:
    """Return whether a mode looks at every operation, or changes its number format."""
    return _get_current_dispatch_mode() is not None or torch.is_autocast_enabled("cpu")


def _marks(module: nn.Module) -> "_Marks":
    """Return what tells a module from another, and from itself with other weights or code.

    References are equal while what they refer to is the same and alive.
    """
    tensors = [
        0 if tensor is None else tensor.data_ptr()
        for kind in (module._parameters, module._buffers)
        for tensor in kind.values()
    ]
    forward = module.__dict__.get("forward") or type(module).forward
    return (weakref.ref(module), forward, *tensors)


def _report(apart: float) -> None:
    LOG.warning(
        "layers of the vision tower run module by module, which is right and slower: the layer in "
        "one call (kernels/native/tower.h) differs from VisionLayer.by_modules by %.2g of what a "
        "layer adds, so a step of modality/image/image.py is missing there",
        apart,
    )


def _products_of(
    layer: Any,  # noqa: ANN401 - a VisionLayer
    dtype: torch.dtype,
) -> "list[PackedLinear | PlainLinear] | None":
    """Return q, k, v, out, fc1 and fc2 as the call takes them; None where it does not."""
    if type(layer.mlp) is not MLP or not _has_only_known(layer):
        return None
    modules = [getattr(layer.self_attn, name) for name in PRODUCTS]
    modules += [layer.mlp.fc1, layer.mlp.fc2]
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None
    if all(isinstance(module, KernelLayer) for module in modules):
        packed = [module.kernel() for module in modules]
        return packed if dtype == torch.float32 and _are_bytes(packed) else None
    plain = [_plain_of(module, dtype) for module in modules]
    return None if None in plain else plain  # type: ignore[return-value]  # none of them is None


def _has_only_known(layer: Any) -> bool:  # noqa: ANN401 - a VisionLayer
    """Return whether the layer has the modules that the call knows, without hooks on them."""
    for path, names in _CHILDREN.items():
        module = layer.get_submodule(path)
        if module._modules.keys() != names or module._parameters or module._buffers:
            return False
        if path and (module._forward_hooks or module._forward_pre_hooks):
            return False
    return True


def _are_bytes(packed: list[PackedLinear]) -> bool:
    """Return whether the weights have 8 bits, meet rounded rows, and have a library."""
    fits = all(
        one.packed.bits == 8
        and not one.weight_only
        and one.library is not None
        and one.packed.out_features % WIDTH_STEP == 0
        for one in packed
    )
    return fits and len({one.packed.group_size for one in packed[:3]}) == 1


def _plain_of(module: nn.Module, dtype: torch.dtype) -> PlainLinear | None:
    if type(module) not in (nn.Linear, FloatLinear) or not isinstance(module, nn.Linear):
        return None
    weight = module.weight
    fits = weight.dtype == dtype and dtype in (torch.float32, torch.bfloat16)
    if not fits or weight.device.type != "cpu" or weight.stride(1) != 1:
        return None
    if weight.shape[0] % WIDTH_STEP or weight.shape[1] % WIDTH_STEP:
        return None
    return PlainLinear(weight, module.bias)


def _facts_of(layer: Any) -> TowerFacts | None:  # noqa: ANN401 - a VisionLayer
    """Return what the layer computes besides products; None where the call cannot."""
    first, second, attention = layer.layer_norm1, layer.layer_norm2, layer.self_attn
    act = layer.mlp.act
    for module in (first, second, act):
        if module._forward_hooks or module._forward_pre_hooks:
            return None
    if type(first) is not nn.LayerNorm or type(second) is not nn.LayerNorm:
        return None
    norms = (first.weight, first.bias, second.weight, second.bias)
    if any(part is None or part.device.type != "cpu" for part in norms) or first.eps != second.eps:
        return None
    heads = attention.num_heads
    rows, hidden = attention.q_proj.out_features, attention.q_proj.in_features
    activation = _activation_of(act)
    if rows % heads or rows // heads % WIDTH_STEP or hidden % WIDTH_STEP or activation is None:
        return None
    return TowerFacts(norms=norms, heads=heads, activation=activation, eps=first.eps)


def _activation_of(act: nn.Module) -> str | None:
    if type(act) is QuickGELU:
        return "quick_gelu"
    if is_gelu_tanh(act):
        return "gelu_tanh"
    return "gelu" if type(act) is nn.GELU and act.approximate == "none" else None
