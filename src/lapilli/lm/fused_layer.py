"""A decoder layer as one call (kernels/layer.py), as long as there is nothing special about it.

Special is everything that the call could not know of: an adapter, a hook, another activation,
another number format, weights that were moved. Looked at before every call, in microseconds. The
call is the layer written a second time: when it is made it is compared with the layer itself, and
left where they differ.
"""

import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from lapilli.kernels.layer import PRODUCTS, WIDTH_STEP, LayerFacts, LayerKernel, PlainLinear
from lapilli.kernels.library import native
from lapilli.kernels.linear import PackedLinear
from lapilli.nn.layers import RMSNorm, is_gelu_tanh
from lapilli.nn.linear import FEW, FloatLinear, KernelLayer
from lapilli.nn.paged import BlockStore, PagedBatch, PagedRow
from lapilli.shapes import Float, Tensor

LOG = logging.getLogger(__name__)
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
        """Leave the addresses out of copies, which make them anew."""
        return {"_layer": self._layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_layer"])  # type: ignore[misc]  # a copy begins as a new one does

    def run(
        self, x: Float[Tensor, "B T D"], table: RotaryTables, cache: object, *, index: int
    ) -> Float[Tensor, "B T D"] | None:
        """Return the hidden states after the layer; None where it runs module by module."""
        if not isinstance(cache, PagedBatch) or torch.is_grad_enabled() or x.shape[0] != 1:
            return None
        places = cache.places
        if places is None or x.dtype != torch.float32 or not x.is_contiguous():
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        made = self._current(cache.unchanged)
        if made is None or made.kernel is None or x.shape[1] > made.most:
            return None
        if any(map(_Part.is_hooked, made.parts)):
            return None
        return made.kernel(x, table, cache.memory(index), places)

    def _current(self, unchanged: object | None) -> "_Made | None":
        """Return the call for the parts of now; not looked at again where somebody watches them.

        Threads and interrupts may come between any two lines: what was made, and with what it was
        seen, are replaced as wholes, and the second says for which of the first it holds.
        """
        made, seen = self._made, self._seen_with
        is_same = made is not None and all(map(_Part.runs_same, made.parts))
        if is_same and seen is not None and unchanged is seen[0] and made is seen[1]:
            return made
        if made is None or not is_same or not all(map(_Part.is_same, made.parts)):
            made = self._made = self._make()
        self._seen_with = None if made is None or unchanged is None else (unchanged, made)
        return made

    def _make(self) -> "_Made | None":
        """Return the call for the modules of now; None where they are not of the plain kind.

        A call that computes something else than the layer is made without its kernel, so that it is
        not compared again until a part changes.
        """
        layer, library = self._layer, native()
        if library is None or not _is_known(layer):
            return None
        attention, mlp = layer.self_attn, layer.mlp
        norms = _norms_of(layer)
        parts = [getattr(attention, f"{name}_proj") for name in PRODUCTS[:4]]
        parts += [getattr(mlp, f"{name}_proj") for name in PRODUCTS[4:]]
        found = [one for one in map(_product_of, parts) if one is not None]
        facts = _facts_of(layer, found)
        if facts is None or len(found) != len(parts) or not _agree(found):
            return None
        watched = [_Part(one) for one in (layer, attention, mlp, mlp.act, *norms.values(), *parts)]
        if any(map(_Part.is_hooked, watched)):
            return None
        weights = {name: norm.weight for name, norm in norms.items()}
        kernel = LayerKernel(library, dict(zip(PRODUCTS, found, strict=True)), weights, facts)
        most = min(MOST[type(one)] for one in found)
        return _Made(kernel if agrees(layer, kernel, facts) else None, most, watched)


@dataclass(frozen=True, slots=True)
class _Made:
    """A call, the most positions it is for, and the modules that it was made of."""

    kernel: LayerKernel | None
    most: int
    parts: "list[_Part]"


class _Part:
    """A module as it was: its children, its code, and where its tensors lie."""

    __slots__ = ("_children", "_forward", "_module", "_tensors")

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._children = [
            None if child is None else weakref.ref(child) for child in module._modules.values()
        ]
        self._tensors = _addresses(module)
        self._forward = _forward_of(module)

    def is_same(self) -> bool:
        """Return whether nothing was replaced or moved."""
        module = self._module()
        if module is None or _addresses(module) != self._tensors:
            return False
        children = module._modules.values()
        return len(children) == len(self._children) and all(
            child is (held and held()) for child, held in zip(children, self._children, strict=True)
        )

    def runs_same(self) -> bool:
        """Return whether the module still runs the code that it ran."""
        module = self._module()
        return module is not None and _forward_of(module) is self._forward

    def is_hooked(self) -> bool:
        """Return whether somebody wants to see or change what goes through."""
        module = self._module()
        return module is None or bool(module._forward_hooks or module._forward_pre_hooks)


def _forward_of(module: nn.Module) -> object:
    """Return the function that runs a module: its class's, or one that was put in its place."""
    return module.__dict__.get("forward") or type(module).forward


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


def _agree(products: Sequence[PackedLinear | PlainLinear]) -> bool:
    """Return whether one call can meet q, k and v with one input, and gate and up with theirs.

    Activations are rounded for all packed layers or for none.
    """
    kinds = [one.kind if isinstance(one, PackedLinear) else None for one in products]
    are_alike = len(set(kinds[:3])) == 1 and len(set(kinds[4:6])) == 1
    rounds = {one.weight_only for one in products if isinstance(one, PackedLinear)}
    return are_alike and len(rounds) < 2


# What the call knows of a layer. Whatever else there is in one makes it run module by module.
_FIELDS = """
    vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim norm_eps
    rope_theta max_positions family rope_scaling local_rope_theta sliding_window full_layers
    qkv_bias output_bias mlp_bias qk_norm norm_offset post_norms query_scalar attention_softcap
    logit_softcap embedding_scale activation tie_embeddings
"""
_NORM_PATHS = (
    {"input": "input_layernorm", "mlp": "post_attention_layernorm"},
    {
        "input": "input_layernorm",
        "attention_out": "post_attention_layernorm",
        "mlp": "pre_feedforward_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
)
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act"})


def _is_known(layer: Any) -> bool:  # noqa: ANN401 - see FusedLayer
    """Return whether the layer has nothing but what the call knows."""
    known_fields = _FIELDS.split()
    unknown = (field for field in fields(layer.config) if field.name not in known_fields)
    if any(getattr(layer.config, field.name) != field.default for field in unknown):
        return False
    norms = frozenset(_NORM_PATHS[layer.post_norms].values())
    known = (
        (layer, norms | {"self_attn", "mlp"}),
        (layer.self_attn, _ATTENTION),
        (layer.mlp, _MLP),
    )
    return all(
        module._modules.keys() <= names and not module._parameters and not module._buffers
        for module, names in known
    )


def _norms_of(layer: Any) -> dict[str, Any]:  # noqa: ANN401 - see FusedLayer
    """Return the norms of a layer by the names of kernels/layer.py."""
    norms = {name: getattr(layer, path) for name, path in _NORM_PATHS[layer.post_norms].items()}
    if layer.self_attn.qk_norm:
        norms |= {"q": layer.self_attn.q_norm, "k": layer.self_attn.k_norm}
    return norms


def _facts_of(
    layer: Any,  # noqa: ANN401 - see FusedLayer
    products: Sequence[PackedLinear | PlainLinear],
) -> LayerFacts | None:
    """Return what the layer computes besides products; None where the call cannot."""
    attention, act, norms = layer.self_attn, layer.mlp.act, list(_norms_of(layer).values())
    if not all(type(one) is RMSNorm and _is_plain(one.weight) for one in norms):
        return None
    ways = {(one.eps, one.offset) for one in norms if isinstance(one, RMSNorm)}
    width = attention.head_dim
    if len(ways) != 1 or width % WIDTH_STEP:
        return None
    if type(act) is not nn.SiLU and not is_gelu_tanh(act):
        return None
    [(eps, offset)] = ways
    return LayerFacts(
        heads=attention.q_proj.out_features // width,
        kv_heads=attention.k_proj.out_features // width,
        width=width,
        window=attention.window,
        scale=attention.scale,
        softcap=attention.softcap,
        eps=eps,
        norm_offset=offset,
        gelu=type(act) is not nn.SiLU,
    )


BLOCK_SIZE = 16
LONGEST_WINDOW = 8192
"""Windows up to which the comparison goes beyond them."""
_REPORTED: set[object] = set()


def agrees(layer: Any, kernel: LayerKernel, facts: LayerFacts) -> bool:  # noqa: ANN401
    """Compare the call with the layer on a few positions that have something before them.

    The call is the layer written a second time. Who adds a step to lm/decoder.py gets right tokens
    all the same: the layer then runs as it stands there, and a warning says so once.
    """
    generator = torch.Generator().manual_seed(0)
    rows = _rows(facts.window)
    places = sum(row.count for row in rows)
    angles = torch.rand(1, 1, places, facts.width // 2, generator=generator) * 6.3
    sine, cosine = angles.sin(), angles.cos()
    table = torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
    x = torch.randn(1, places, layer.config.hidden_size, generator=generator)
    keys, values = _memory(facts, generator)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for results, whole in ((found, True), (expected, False)):
        store = _store(layer, keys.clone(), values.clone())
        cache = PagedBatch(store, rows, whole_layers=whole)
        if whole and cache.places is not None:
            results.append(kernel(x, table, cache.memory(0), cache.places) - x)
        else:
            results.append(layer(x, table, None, cache) - x)
        results += cache.memory(0)
    worst = max(_distance(a, b) for a, b in zip(found, expected, strict=True))
    # One weight in bits among floats: a last bit can round an activation to its other neighbour.
    if worst <= (2e-3 if kernel.is_packed else 3e-4):
        return True
    if not math.isnan(worst):  # weights that are no numbers prove nothing
        _report(layer, worst)
    return False


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return how far the vectors of the last axis are apart, as a share of the largest number."""
    size = expected.abs().amax(dim=-1).clamp(min=1e-3)
    return ((found - expected).abs().amax(dim=-1) / size).amax().item()


def _rows(window: int | None) -> list[PagedRow]:
    """Return three sequences: a few positions, some, and more than the window where there is one.

    The long one comes to its length by the same two blocks again and again, between a first and a
    last block of its own: what a window hides of it is other than what it shows.
    """
    length = min(window or 256, LONGEST_WINDOW) + 3 * BLOCK_SIZE
    blocks = length // BLOCK_SIZE + 1
    middle = [5 + at % 2 for at in range(blocks - 2)]
    return [
        PagedRow([1], 5, 1),
        PagedRow([4, *middle, 7], blocks * BLOCK_SIZE - 3, 1),
        PagedRow([2, 3], 21, 2),
    ]


def _memory(facts: LayerFacts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return blocks of keys and values; keys of very different sizes, so that scores are too.

    Values are large, so that what attention adds is not lost in what the MLP adds: most in the
    first block of the long sequence, which is one of many.
    """
    shape = (8, facts.kv_heads, BLOCK_SIZE, facts.width)
    sizes = torch.tensor([0.0, 0.1, 1.0, 1.0, 3.0, 0.3, 3.0, 1.0])[:, None, None, None]
    keys = torch.randn(shape, generator=generator) * sizes
    values = torch.randn(shape, generator=generator) * 10
    values[4] *= 10
    return keys, values


def _store(layer: Any, keys: Tensor, values: Tensor) -> BlockStore:  # noqa: ANN401
    """Return a store in which every layer has these keys and values."""
    one = replace(layer.config, num_layers=1)
    store = BlockStore(
        one, 8, block_size=BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu")
    )
    count = layer.self_attn.layer + 1
    store.keys, store.values = [keys] * count, [values] * count
    return store


def _report(layer: nn.Module, worst: float) -> None:
    """Warn once of every code that a layer has."""
    code = tuple(_forward_of(module) for module in layer.modules())
    if code in _REPORTED:
        return
    _REPORTED.add(code)
    LOG.warning(
        "layers run module by module, which is right and slower: the layer in one call "
        "(lm/fused_layer.py, kernels/native/layer.h) differs from DecoderLayer.forward by %.2g of "
        "what a layer adds, so a step of lm/decoder.py is missing there",
        worst,
    )
