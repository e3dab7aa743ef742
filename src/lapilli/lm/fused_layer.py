"""A decoder layer, and all layers, as one call, as long as there is nothing special about them.

Special is everything that the call could not know of: an adapter, a hook, another activation,
another number format, weights that were moved. Looked at before every call, in microseconds. The
call is the layer written a second time: when it is made it is compared with the layer itself, and
left where they differ.
"""

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from lapilli.kernels.layer import (
    PRODUCTS,
    WIDTH_STEP,
    LayerFacts,
    LayerKernel,
    PlainLinear,
    StepKernel,
)
from lapilli.kernels.library import native
from lapilli.kernels.linear import PackedLinear
from lapilli.nn.layers import RMSNorm, is_gelu_tanh
from lapilli.nn.linear import FEW, FloatLinear, KernelLayer, is_hooked
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
        if not isinstance(cache, PagedBatch) or cache.places is None or not _is_step(x):
            return None
        made = self.current(cache.unchanged)
        if made is None or made.kernel is None or x.shape[1] > made.most:
            return None
        if made.watch.is_hooked():
            return None
        return made.kernel(x, table, cache.memory(index), cache.places)

    def current(self, unchanged: object | None) -> "_Made | None":
        """Return the call for the parts of now; not looked at again where somebody watches them.

        Threads and interrupts may come between any two lines: what was made, and with what it was
        seen, are replaced as wholes, and the second says for which of the first it holds.
        """
        made, seen = self._made, self._seen_with
        is_same = made is not None and made.watch.runs_same()
        if is_same and seen is not None and unchanged is seen[0] and made is seen[1]:
            return made
        if made is None or not is_same or not made.watch.is_same():
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
        watch = _Watch([layer, attention, mlp, mlp.act, *norms.values(), *parts])
        if watch.is_hooked():
            return None
        weights = {name: norm.weight for name, norm in norms.items()}
        kernel = LayerKernel(library, dict(zip(PRODUCTS, found, strict=True)), weights, facts)
        most = min(MOST[type(one)] for one in found)
        return _Made(kernel if agrees(layer, kernel, facts) else None, most, watch)


class FusedLayers:
    """All layers of a decoder as one call, where each of them is one.

    Between two calls a layer's weights are not read, and reading them is what a token waits for.

    Holds no weight, as FusedLayer.

    Args:
        decoder: with `model.layers` and `local_layers`; asked for them anew after every change.
        layer_type: of layers whose forward pass is known.
    """

    def __init__(self, decoder: Any, layer_type: type[nn.Module]) -> None:  # noqa: ANN401
        self._decoder = decoder
        self._layer_type = layer_type
        self._made: _MadeStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the addresses out of copies, which make them anew."""
        return {"_decoder": self._decoder, "_layer_type": self._layer_type, "_made": None}

    def run(
        self,
        x: Float[Tensor, "B T D"],
        tables: Callable[[bool], RotaryTables],
        cache: object,
    ) -> Float[Tensor, "B T D"] | None:
        """Return the hidden states after the last layer; None where layers run one by one.

        Args:
            x: hidden states before the first layer.
            tables: gives cosines and signed sines, of local layers or of the others.
            cache: of keys and values.
        """
        if not isinstance(cache, PagedBatch) or cache.places is None or not _is_step(x):
            return None
        made = self._current(cache.unchanged)
        if made is None or x.shape[1] > made.most:
            return None
        held = made.held()  # until the call is over
        if None in held:
            return None
        other = tables(made.locals[0])
        pair = (tables(False), tables(True)) if len(set(made.locals)) > 1 else (other, other)
        memory = [cache.memory(index) for index in range(len(made.locals))]
        return made.kernel(x, pair, memory, cache.places)

    def _current(self, unchanged: object | None) -> "_MadeStep | None":
        """Return the call for the layers of now; None where one of them runs module by module."""
        made = self._made
        is_watched = made is not None and unchanged is not None and made.unchanged is unchanged
        # Who gives `unchanged` has looked at everything of the modules, hooks too, but not at the
        # code of their classes.
        if made is not None and is_watched and made.watch.has_same_classes():
            return made
        layers = list(self._decoder.model.layers)
        if unchanged is None or not layers:
            return None
        if any(type(one) is not self._layer_type or "forward" in vars(one) for one in layers):
            return None
        found = [layer.fused.current(unchanged) for layer in layers]
        ready = [(one, one.kernel) for one in found if one is not None and one.kernel is not None]
        if len(ready) < len(layers) or any(one.watch.is_hooked() for one, _ in ready):
            return None
        kernels, local = [kernel for _, kernel in ready], self._decoder.local_layers
        self._made = made = _MadeStep(
            StepKernel(kernels, local),
            [weakref.ref(kernel) for kernel in kernels],
            min(one.most for one, _ in ready),
            _Watch([module for one, _ in ready for module in one.watch.modules()]),
            local,
            unchanged,
        )
        return made


def _is_step(x: Float[Tensor, "B T D"]) -> bool:
    """Return whether these are positions whose layers may be calls."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if is_hooked():  # whatever module it is
        return False
    return x.shape[0] == 1 and x.dtype == torch.float32 and x.is_contiguous()


@dataclass(frozen=True, slots=True)
class _Made:
    """A call, the most positions it is for, and the modules that it was made of."""

    kernel: LayerKernel | None
    most: int
    watch: "_Watch"


@dataclass(frozen=True, slots=True)
class _MadeStep:
    """The call for all layers, theirs, which of them are local, and with what they were seen."""

    kernel: StepKernel
    layers: "list[weakref.ref[LayerKernel]]"
    most: int
    watch: "_Watch"
    locals: Sequence[bool]
    unchanged: object

    def held(self) -> list[LayerKernel | None]:
        """Return the calls of the layers; None where one is gone, with what it described."""
        return [layer() for layer in self.layers]


class _Watch:
    """Modules as they were: their children, their code, and where their tensors lie.

    Looked at in every step, so the loops run in C.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._types: list[type[nn.Module]] = [type(module) for module in modules]
        self._sizes = [len(vars(module)) for module in modules]
        self._own = [(i, _forward_of(m)) for i, m in enumerate(modules) if "forward" in vars(m)]
        self._forwards = [(kind, kind.forward) for kind in dict.fromkeys(self._types)]
        self._children = [
            [None if child is None else weakref.ref(child) for child in module._modules.values()]
            for module in modules
        ]
        self._tensors = list(map(_addresses, modules))

    def modules(self) -> list[nn.Module]:
        """Return the modules; fewer where some are gone."""
        return [module for module in (held() for held in self._modules) if module is not None]

    def runs_same(self) -> bool:
        """Return whether the modules are there and run the code that they ran."""
        modules = self.modules()
        if list(map(type, modules)) != self._types:
            return False
        if not self.has_same_classes():
            return False
        # One more attribute: a forward of its own, maybe.
        if list(map(len, map(vars, modules))) != self._sizes:
            return False
        return all(_forward_of(modules[i]) is forward for i, forward in self._own)

    def has_same_classes(self) -> bool:
        """Return whether the classes of the modules run the code that they ran."""
        return all(kind.forward is forward for kind, forward in self._forwards)

    def is_same(self) -> bool:
        """Return whether nothing was replaced or moved."""
        modules = self.modules()
        if len(modules) != len(self._modules) or list(map(_addresses, modules)) != self._tensors:
            return False
        return all(
            len(module._modules) == len(held)
            and all(
                child is (one and one())
                for child, one in zip(module._modules.values(), held, strict=True)
            )
            for module, held in zip(modules, self._children, strict=True)
        )

    def is_hooked(self) -> bool:
        """Return whether somebody wants to see or change what goes through."""
        modules = self.modules()
        if len(modules) != len(self._modules):
            return True
        return is_hooked(*modules)


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
    """Return whether q, k and v are all packed or none of them, and gate and up likewise.

    Activations are rounded for all packed layers or for none.
    """
    kinds = [type(one) for one in products]
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
