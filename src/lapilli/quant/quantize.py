"""The quantization pass: how linear layers are stored, their rounding, and their replacement.

8 bits   by output channel:  q = round(w / s),  s = max|w| / 127
4 bits   nonlinear levels:  16 fixed ones, with a signed scale of 8 bits for every 16 inputs and
         one for every row (kernels/levels.py);  by group, symmetric:  q - 8 = round(w / s) in
         -8..7, s signed so that the largest weight can take the -8, with a search for the scale;
         with zeros:  q = round(w / s) + z in 0..15, as AWQ's files have it

Knows a plain model; must not know how packed layers compute.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lapilli.config.reader import check_fields, check_type
from lapilli.errors import ConfigError
from lapilli.kernels.levels import round_levels
from lapilli.kernels.packing import (
    BITS,
    BLOCK,
    BYTE_ZERO,
    CHUNK,
    GROUPS,
    NIBBLE_ZERO,
    Packed,
    block_bias,
    by_block,
    pack4,
    pack8,
    pad_to,
)
from lapilli.quant.linear import QuantLinear
from lapilli.shapes import Float, Tensor

MODES = ("dynamic", "weight_only")
LEVELS = {"nonlinear": "nonlinear levels", "symmetric": "symmetric", "zeros": "zero points"}
"""The 16 values of a weight of 4 bits, and what reports call them."""
# The group size of each number of bits where none is asked for. Finer activations at 8 bits cost
# nothing for one token; none of 500 answers of pebble changed.
GROUP_SIZES = {8: 32, 4: 128}
NONLINEAR_GROUP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """The way in which the linear layers of a model are stored and computed.

    Attributes:
        bits: 8: one scale per output channel; 4: one scale per group of inputs.
        group_size: 32, 64 or 128 inputs that share a scale: of the activations that are rounded on
            the fly, and at 4 bits with linear levels of the weights. 0 stands for 32 at 8 bits,
            64 at 4 bits with nonlinear levels and 128 with linear ones.
        levels: of 4 bits. "nonlinear": levels that are closer to each other near zero, and a scale
            for every 16 inputs, whatever the group; "symmetric": scales of groups alone; "zeros":
            scales and zero points, as AWQ has them.
        value_bits: bits of the projections that make the values of attention, of which 4 bits cost
            most: 3 % of the layers of SmolLM2, a quarter of its divergence. 0 stands for 8 with
            nonlinear levels, and for `bits` otherwise.
        mode: "dynamic" rounds activations to 8 bits by token and group, so that products are
            integers; "weight_only" keeps them in float32.
        head_bits: bits of the layer that gives the logits, which are the most sensitive; None: it
            stays float. A model with tied embeddings gets such a layer when it is loaded, of the
            values of its table, which stays float.
        quantize_tower: the vision tower and the projector too, in 8 bits.
        search: at 4 bits, look for the scale with the least squared error instead of the one that
            just covers the largest weight. Nonlinear levels are always looked for.

    Raises:
        ConfigError: a number that there are no kernels for, or a value of another type.
    """

    bits: int = 4
    group_size: int = 0
    levels: str = "nonlinear"
    value_bits: int = 0
    mode: str = "dynamic"
    head_bits: int | None = 8
    quantize_tower: bool = False
    search: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        for name, bits in (("bits", self.bits), ("head_bits", self.head_bits)):
            if bits not in BITS and not (name == "head_bits" and bits is None):
                raise ConfigError(f"{name} must be 4 or 8, found {bits}")
        if self.group_size == 0:
            is_nonlinear = self.bits == 4 and self.levels == "nonlinear"
            size = NONLINEAR_GROUP if is_nonlinear else GROUP_SIZES[self.bits]
            object.__setattr__(self, "group_size", size)
        if self.group_size not in GROUPS:
            raise ConfigError(f"group_size must be 32, 64 or 128, found {self.group_size}")
        if self.levels not in LEVELS:
            known = ", ".join(LEVELS)
            raise ConfigError(f"levels must be one of {known}, found {self.levels!r}")
        if self.value_bits == 0:
            more = 8 if self.levels == "nonlinear" else self.bits
            object.__setattr__(self, "value_bits", more)
        if self.value_bits not in BITS:
            raise ConfigError(f"value_bits must be 4 or 8, found {self.value_bits}")
        if self.mode not in MODES:
            raise ConfigError(f"mode must be dynamic or weight_only, found {self.mode!r}")


def describe(config: QuantConfig) -> str:
    """Return how weights are stored in the words of reports: bits, groups, zero points, mode."""
    levels = "" if config.bits == 8 else f", {LEVELS[config.levels]}"
    values = "" if config.value_bits == config.bits else f", values in {config.value_bits} bits"
    return f"{config.bits} bits, groups of {config.group_size}{levels}{values}, {config.mode}"


def quant_config(scheme: str | QuantConfig, *, quantize_tower: bool = False) -> QuantConfig:
    """Return the configuration that a name stands for.

    Raises:
        ConfigError: no scheme has this name.
    """
    if isinstance(scheme, QuantConfig):
        return scheme
    match scheme:
        case "int8":
            return QuantConfig(bits=8, quantize_tower=quantize_tower)
        case "int4":
            return QuantConfig(bits=4, quantize_tower=quantize_tower)
    raise ConfigError(f"quantize={scheme!r} is unknown: choose int8, int4 or a QuantConfig")


_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_HALF_MAX = 65504.0
_PIECE = 1 << 18  # weights rounded at once: what is computed of them stays in the cache


def round8(weight: Float[Tensor, "out in"], bias: Tensor | None, group_size: int = 128) -> Packed:
    """Round a linear layer to 8 bits; `group_size` is of the activations."""
    out_features, in_features = weight.shape
    values = torch.empty((out_features, in_features), dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, dtype=torch.float32, device=weight.device)
    step = _rows_at_once(in_features)
    for rows in range(0, out_features, step):
        piece = weight[rows : rows + step].detach().float()
        scale = piece.abs().amax(dim=1) / 127.0
        factor = torch.where(scale > 0, 1.0 / scale, 0.0)
        near = (piece * factor[:, None]).round_().clamp_(-127, 127)
        values[rows : rows + step] = (near + BYTE_ZERO).to(torch.uint8)
        scales[rows : rows + step] = scale
    blocked = by_block(scales[:, None])[:, 0]
    return Packed(
        pack8(values), blocked, None, block_bias(bias), out_features, in_features, group_size, 8
    )


def round4(
    weight: Float[Tensor, "out in"], bias: Tensor | None, config: QuantConfig, *, bits: int = 4
) -> Packed:
    """Round a linear layer to 4 bits, or to 3 of them, which are stored as 4.

    Raises:
        ConfigError: weights too large for a float16 scale, or no numbers, or 3 bits of nonlinear
            levels.
    """
    if config.levels == "nonlinear":
        if bits != 4:
            raise ConfigError(f"{bits} bits have linear levels: choose zeros or symmetric")
        return round_levels(weight, bias, config.group_size)
    is_symmetric = config.levels == "symmetric"
    span = nibbles_of(bits, config.levels)
    out_features, in_features = weight.shape
    groups = -(-in_features // config.group_size)
    padded = -(-in_features // CHUNK) * CHUNK
    data, scales, zeros = [], [], []
    step = _rows_at_once(in_features)
    for rows in range(0, out_features, step):
        piece = weight[rows : rows + step].detach().float()
        piece = pad_to(piece, 1, config.group_size, 0).view(len(piece), groups, -1)
        values, scale, zero = (
            _symmetric(piece, span, search=config.search)
            if is_symmetric
            else _with_zeros(piece, span)
        )
        if not bool(torch.isfinite(scale).all()):
            raise ConfigError(f"weights above {_HALF_MAX:.0f} x 8 do not fit into 4 bits")
        flat = values.to(torch.uint8).view(len(piece), -1)[:, :padded]
        data.append(pack4(flat.contiguous()))
        scales.append(by_block(scale))
        zeros.append(by_block(zero))
    return Packed(
        torch.cat(data),
        torch.cat(scales),
        None if is_symmetric else torch.cat(zeros),
        block_bias(bias),
        out_features,
        in_features,
        config.group_size,
        4,
    )


def nibbles_of(bits: int, levels: str) -> tuple[int, int]:
    """Return the least and the largest nibble of weights in 3 or 4 bits with linear levels."""
    half = 1 << (bits - 1)
    if levels == "symmetric":
        return NIBBLE_ZERO - half, NIBBLE_ZERO + half - 1
    return 0, 2 * half - 1


def _rows_at_once(in_features: int) -> int:
    """Return a number of rows that is one of whole blocks."""
    return max(_PIECE // in_features // BLOCK, 1) * BLOCK


_Rounded = tuple[Tensor, Tensor, Tensor]
_Nibbles = tuple[int, int]


def _quantized(groups: Tensor, scale: Tensor, zero: Tensor | int, span: _Nibbles) -> Tensor:
    """Return nibbles of groups [rows, groups, group] as floats."""
    factor = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (groups * factor[..., None]).round_().add_(zero).clamp_(*span)


def _symmetric(groups: Tensor, span: _Nibbles, *, search: bool) -> _Rounded:
    """Return nibbles, scales and zeros; the scale of the least squared error among a few."""
    index = groups.abs().argmax(dim=-1, keepdim=True)
    cover = groups.gather(-1, index).squeeze(-1) / (span[0] - NIBBLE_ZERO)
    best_error: Tensor | None = None
    best, best_scale = groups, cover.half()
    for shrink in _SHRINK if search else _SHRINK[:1]:
        scale = (cover * shrink).half()
        values = _quantized(groups, scale.float(), NIBBLE_ZERO, span)
        error = ((values - NIBBLE_ZERO) * scale.float()[..., None] - groups).square_().sum(-1)
        if best_error is None:
            best_error, best, best_scale = error, values, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better[..., None], values, best)
        best_scale = torch.where(better, scale, best_scale)
    return best, best_scale, torch.full_like(cover, NIBBLE_ZERO, dtype=torch.uint8)


def _with_zeros(groups: Tensor, span: _Nibbles) -> _Rounded:
    """Return nibbles, scales and zeros that cover the range from the least to the largest weight.

    Note: the range always contains 0, so that padding and zero weights stay zero; AWQ's own rule
    does not, and loses groups of one sign.
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / span[1]).half()
    exact = scale.float()
    zero = torch.where(exact == 0, 0.0, -low / exact).round_().clamp_(*span)
    return _quantized(groups, exact, zero[..., None], span), scale, zero.to(torch.uint8)


LANGUAGE_MODEL = "language_model."
ATTENDING = "language_model.cross_attention."  # part of the joint, which stays float
HEAD = ".lm_head"
VALUES = ".v_proj"
SEEN = ("modalities.",)  # towers and projectors


@dataclass(frozen=True, slots=True)
class QuantReport:
    """The outcome of a quantization pass.

    Attributes:
        bits: of every replaced layer, by full path, in the order of the model.
        num_bytes: of the packed layers.
        num_bytes_before: of the same layers as they were.
        notes: what was asked for and could not be done, one sentence each.
    """

    bits: dict[str, int]
    num_bytes: int
    num_bytes_before: int
    notes: tuple[str, ...] = ()


def bits_of(path: str, config: QuantConfig) -> int | None:
    """Return the bits in which the linear layer of this path is stored; None: as it is."""
    if path.startswith(ATTENDING):
        return None
    if path.startswith(LANGUAGE_MODEL):
        if path.endswith(VALUES):
            return max(config.value_bits, config.bits)
        if not path.endswith(HEAD):
            return config.bits
        return None if config.head_bits is None else max(config.head_bits, config.bits)
    if config.quantize_tower and path.startswith(SEEN):
        return 8
    return None


def notes_on(paths: Iterable[str], config: QuantConfig) -> tuple[str, ...]:
    """Return what `config` asks for and a model with linear layers of these paths cannot have."""
    paths = list(paths)
    found = []
    has_head = any(path.startswith(LANGUAGE_MODEL) and path.endswith(HEAD) for path in paths)
    if config.head_bits is not None and not has_head:
        found.append(
            "the logits stay float: they are made of the embedding table, and head_bits "
            f"{config.head_bits} changes nothing; lapilli.load(..., quantize=) makes a layer of "
            "them"
        )
    if config.quantize_tower and not any(path.startswith(SEEN) for path in paths):
        found.append(
            "the model reads text only: it has no vision tower, and quantize_tower (--tower) "
            "changes nothing"
        )
    return tuple(found)


def round_weight(weight: Tensor, bias: Tensor | None, bits: int, config: QuantConfig) -> Packed:
    """Return one weight, packed; 3 bits lie in the layout of 4."""
    if bits == 8:
        return round8(weight, bias, config.group_size)
    return round4(weight, bias, config, bits=bits)


def quantize(model: nn.Module, config: QuantConfig) -> QuantReport:
    """Quantize the linear layers of `model` to 4 or 8 bits; the model is changed in place.

    The language model's layers, and with `quantize_tower` those of towers and projectors; norms
    and embeddings stay. Every parameter that is left is frozen: packed layers have no gradients.

    Args:
        model: a VisionLanguageModel without adapters.
        config: see QuantConfig.

    Raises:
        ConfigError: the model is quantized already, has adapters, or nothing in it is a target; or
            `config` is none.
    """
    check_type("config", config, QuantConfig)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError("the model is quantized already: load it again to quantize it otherwise")
    if any(name.endswith(".lora_A.weight") for name, _ in model.named_parameters()):
        raise ConfigError("the model has an unmerged adapter: lapilli.lora.merge(model) first")
    report = pack_layers(model, config)
    if not report.bits:
        raise ConfigError(f"no linear layer lies under {LANGUAGE_MODEL}: is this a whole model?")
    return report


def pack_layers(model: nn.Module, config: QuantConfig) -> QuantReport:
    """Round the linear layers that `config` names and that are not packed yet, in place."""
    done: dict[str, int] = {}
    after = before = 0
    # The modules are looked up by name one at a time: a list of them would keep every old weight.
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        bits = bits_of(path, config)
        if bits is None:
            continue
        old = model.get_submodule(path)
        if not isinstance(old, nn.Linear):
            continue
        packed = round_weight(old.weight, old.bias, bits, config)
        layer = QuantLinear(packed, weight_only=config.mode == "weight_only")
        model.set_submodule(path, layer.train(old.training))
        done[path] = bits
        before += old.weight.nbytes
        after += packed.num_bytes
    model.requires_grad_(False)
    return QuantReport(done, after, before, notes_on(paths, config))
