"""Inputs of the linear layers of one decoder layer, seen while samples pass it.

    sample [1, T, D] --layer--> sample [1, T, D]
       |   q, k, v see the first norm's output, o what attention gives,
       '-> gate and up the second norm's output, down what the gate lets through

Everything that quantization from samples looks at is here: means and sums over all positions, and
the inputs themselves of some samples. Knows decoder layers and how weights are rounded; must not
know how a method chooses.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from lapilli.errors import ConfigError
from lapilli.kernels.packing import SPAN, Packed, rounded
from lapilli.lm.decoder import Decoder, DecoderLayer
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import LANGUAGE_MODEL, QuantConfig, bits_of, round_weight
from lapilli.shapes import Bool, Float, Tensor

ATTENTION, MLP = "self_attn", "mlp"
SHARED_INPUTS: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""Linear layers of a decoder layer by the first one that sees the same input."""
SEARCHED = 1024
"""Positions whose inputs are kept, for what is computed again and again."""


@dataclass(slots=True, eq=False)
class Sample:
    """One calibration sample on its way through the layers.

    Attributes:
        hidden: float32 hidden states before a layer.
        is_picture: which positions hold features of a medium.
        counts: which positions the loss counts, their own token being the one that is predicted.
        ids: of the tokens; the one under a feature means nothing.
    """

    hidden: Float[Tensor, "1 T D"]
    is_picture: Bool[Tensor, " T"]
    counts: Bool[Tensor, " T"]
    ids: Tensor

    def __len__(self) -> int:
        return self.hidden.shape[1]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the linear layers of a decoder layer are rounded, and what they compute then.

    Attributes:
        config: as of the whole model.
        bits: of the layers that `config` puts into 4: 4, or 3, which lie in the same layout.
        floats: names of layers that stay floats, since the files could not hold them.
    """

    config: QuantConfig
    bits: int = 4
    floats: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Return the names of the linear layers that are rounded."""
        return [name for name in linear_names() if name not in self.floats]

    def bits_of(self, name: str) -> int:
        """Return the bits of a linear layer by its name in the decoder layer."""
        bits = bits_of(f"{LANGUAGE_MODEL}{name}", self.config) or self.config.bits
        return self.bits if bits == 4 else bits

    def scale_width(self, name: str, in_features: int) -> int:
        """Return the number of inputs of a row that share a scale."""
        if self.bits_of(name) == 8:
            return in_features
        return SPAN if self.config.levels == "nonlinear" else self.config.group_size

    def pack(self, name: str, weight: Float[Tensor, "out in"], bias: Tensor | None) -> Packed:
        """Round a weight to the nearest levels."""
        return round_weight(weight, bias, self.bits_of(name), self.config)

    def linear(self, packed: Packed) -> QuantLinear:
        """Return the layer that computes with a packed weight."""
        return QuantLinear(packed, weight_only=self.config.mode == "weight_only")

    def pack_layer(self, layer: DecoderLayer) -> None:
        """Round the linear layers of a decoder layer to the nearest levels, in place."""
        for name in self.names:
            linear = linear_of(layer, name)
            packed = self.pack(name, linear.weight, linear.bias)
            layer.set_submodule(name, self.linear(packed))

    def seen(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """Return the activations that a packed weight is multiplied with."""
        return x if self.config.mode == "weight_only" else rounded(x, self.config.group_size)


@dataclass(slots=True, eq=False)
class Seen:
    """What was seen of one input of a decoder layer.

    Attributes:
        total: of |x| over all positions, for each channel.
        positions: how many they were.
        kept: the inputs of some samples, [T, in] each.
        gram: the sum of x x^T, x as packed weights see it and by how much its position counts; None
            where nobody asked for it.
    """

    total: Float[Tensor, " in"]
    positions: int = 0
    kept: list[Float[Tensor, "T in"]] = field(default_factory=list)
    gram: Float[Tensor, "in in"] | None = None

    @property
    def mean(self) -> Float[Tensor, " in"]:
        """Return the mean of |x| of each channel."""
        return self.total / max(self.positions, 1)

    def divide(self, scales: Float[Tensor, " in"]) -> None:
        """Take the inputs as they are once a scale of each channel was moved into the weights."""
        self.total /= scales
        self.kept = [x / scales for x in self.kept]
        if self.gram is not None:
            self.gram /= scales[:, None] * scales


class CalibrationLayer:
    """One decoder layer in float32, the samples before it, and what its linear layers see.

    Args:
        decoder: the language model.
        index: of the layer, which is copied.
        samples: before this layer.
        rounding: of its linear layers.
        weights: of positions of text and of features, for the loss over the updates of attention
            and of the MLP; None: all count alike.

    Attributes:
        layer: the copy, whose weights a method changes.
        seen: by the first linear layer of each input, after `observe`.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        samples: Sequence[Sample],
        rounding: Rounding,
        weights: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self._decoder, self.index, self.samples = decoder, index, samples
        self.rounding, self._weights = rounding, weights
        self.stored = decoder.layer(index).input_layernorm.weight.dtype
        self.layer: DecoderLayer = float_copy(decoder.layer(index), samples[0].hidden.device)
        self.searched = searched(samples)
        self.seen: dict[str, Seen] = {}
        self.outputs: list[Float[Tensor, "1 T D"]] = []

    def run(self, layer: nn.Module, x: Float[Tensor, "1 T D"]) -> Float[Tensor, "1 T D"]:
        """Return what a decoder layer or its attention makes of a sample."""
        return run_layer(self._decoder, self.index, layer, x)

    def inspect(self, name: str, x: Float[Tensor, "T in"]) -> Float[Tensor, "T out"]:
        """Return what a part of the layer makes of its input."""
        module = self.layer.get_submodule(name)
        return (self.run(module, x[None]) if name == ATTENTION else module(x[None]))[0]

    @torch.no_grad()
    def observe(self, *, gram: bool = False) -> None:
        """Run the layer over all samples; keep what its linear layers see, and its outputs.

        Raises:
            ConfigError: an output is NaN or infinite.
        """
        for number, sample in enumerate(self.samples):
            with self._hooks(number, gram=gram):
                out = self.run(self.layer, sample.hidden)
            check_finite(out, self.index, number)
            self.outputs.append(out)

    @contextmanager
    def _hooks(self, number: int, *, gram: bool) -> Iterator[None]:
        handles, keep = [], number in self.searched
        for name in SHARED_INPUTS:
            weight = self._weight(number, name).sqrt() if gram else None
            note = partial(self._note, name, keep=keep, weight=weight, parts=[])
            handles.append(self.layer.get_submodule(name).register_forward_pre_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(
        self,
        name: str,
        _: nn.Module,
        given: tuple[Tensor, ...],
        *,
        keep: bool,
        weight: Float[Tensor, "T 1"] | None,
        parts: list[Tensor],
    ) -> None:
        """Keep what a linear layer is given; an MLP may see a long sample in several parts.

        With the square root of every position's weight, the second moments too.
        """
        x = given[0].flatten(0, -2)
        begin = sum(map(len, parts))
        seen = self.seen.setdefault(name, Seen(torch.zeros_like(x[0])))
        seen.total += x.abs().sum(dim=0)
        seen.positions += len(x)
        if keep and parts:
            seen.kept.pop()
        parts.append(x if keep else x[:, :0])
        if keep:
            seen.kept.append(torch.cat(parts))
        if weight is not None:
            x = self.rounding.seen(x) * weight[begin : begin + len(x)]
            more = x.t() @ x
            seen.gram = more if seen.gram is None else seen.gram.add_(more)

    def weight_of(self, inspected: str) -> list[Float[Tensor, "T 1"]]:
        """Return how much each position of the kept samples counts in the loss over a part."""
        return [self._weight(number, inspected) for number in self.searched]

    def _weight(self, number: int, name: str) -> Float[Tensor, "T 1"]:
        """Return how much each position of a sample counts in a part of the layer."""
        part = ATTENTION if name.startswith(ATTENTION) else MLP
        of_text, of_features = (1.0, 1.0) if self._weights is None else self._weights[part]
        is_picture = self.samples[number].is_picture[:, None]
        return torch.where(is_picture, of_features, of_text).float()

    @torch.no_grad()
    def error(self, layer: DecoderLayer) -> float:
        """Return the squared error of a layer's update of the kept samples, relative to it."""
        missed = whole = 0.0
        for number, weight in zip(self.searched, self.weight_of(MLP), strict=True):
            before, after = self.samples[number].hidden, self.outputs[number]
            missed += float(((self.run(layer, before) - after).square() * weight).sum())
            whole += float(((after - before).square() * weight).sum())
        return missed / whole if whole else 0.0

    def rounded_to_nearest(self) -> DecoderLayer:
        """Return a copy of the layer whose weights are rounded, nothing being searched for."""
        plain = float_copy(self._decoder.layer(self.index), self.samples[0].hidden.device)
        self.rounding.pack_layer(plain)
        return plain


def check_finite(out: Tensor, layer: int, sample: int) -> None:
    """Check what a layer makes of a sample.

    Raises:
        ConfigError: it is NaN or infinite.
    """
    if not bool(torch.isfinite(out).all()):
        raise ConfigError(
            f"layer {layer} makes NaN or infinity of calibration sample {sample}: the weights are "
            "damaged, or were trained in a wider number format"
        )


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """Return a linear layer that is still in floats.

    Raises:
        ConfigError: it is something else.
    """
    found = layer.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise ConfigError(f"{name} is packed already")
    return found


def linear_names() -> list[str]:
    """Return the names of the linear layers of a decoder layer."""
    return [name for names in SHARED_INPUTS.values() for name in names]


def float_copy(layer: DecoderLayer, device: torch.device) -> DecoderLayer:
    """Return a copy of a layer in float32 that is independent of the files."""
    return copy.deepcopy(layer).to(device, torch.float32).requires_grad_(requires_grad=False)


def run_layer(
    decoder: Decoder, index: int, layer: nn.Module, x: Float[Tensor, "1 T D"]
) -> Float[Tensor, "1 T D"]:
    """Return what a layer of this number, or its attention, makes of a sample."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    table, mask = decoder.layer_context(index, positions, x.dtype)
    out: Tensor = layer(x, table, mask, None)
    return out


def searched(samples: Sequence[Sample], most: int = SEARCHED) -> list[int]:
    """Return the numbers of samples, spread evenly, that have at most so many positions."""
    total = sum(len(sample) for sample in samples)
    step = max(1.0, total / most)
    found: list[int] = []
    positions, at = 0, 0.0
    while int(at) < len(samples):
        size = len(samples[int(at)])
        if found and positions + size > most:
            break
        found.append(int(at))
        positions += size
        at += step
    return found
