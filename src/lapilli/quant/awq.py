"""AWQ: channels that activations make important are scaled up before weights are rounded.

    W x = (W s) (x / s)        s = mean|x|^r, r from 0 to 0.95; 1 / s goes into what comes before
                               it: a norm's gain, or the rows of the linear layer there

The share r is the one with the least error of what will run: rounded weights, and activations in 8
bits where the model rounds them. Then the scaled weights are rounded as gptq.py does. The published
algorithm instead cuts the largest weights of every group where that makes the group's product more
exact, and rounds to the nearest; its layers are better than without, and yet whole models can be
further from float than plain rounding leaves them (docs/quantization.md). MBQ is the same search,
in which positions of text and of features count by what their gradients are (sensitivity.py).

Source: Lin et al. 2023, AWQ section 3.2 (arXiv 2306.00978) and the search of llm-awq; Li et al.
2025, MBQ (arXiv 2412.19509).
Note: with grouped-query attention the scales between values and output projection are those of a
key-value head, over all query heads that share it; llm-awq leaves such layers out.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lapilli.lm.decoder import DecoderLayer
from lapilli.nn.layers import RMSNorm
from lapilli.quant.activations import SHARED_INPUTS, CalibrationLayer, linear_of
from lapilli.quant.gptq import quantize_by_gptq
from lapilli.shapes import Float, Tensor

SHARES = tuple(step / 20 for step in range(20))
SHRINKS = tuple(1 - step / 20 for step in range(10))
UNCLIPPED = ("q_proj", "k_proj")  # attention's scores are too sensitive. Source: llm-awq
CLIP_POSITIONS = 512
_LEAST = 1e-4


@dataclass(frozen=True, slots=True)
class ScaledInput:
    """An input whose channels are scaled.

    Attributes:
        name: of the first linear layer that sees it, as in SHARED_INPUTS.
        before: what makes it: a norm or a linear layer.
        inspected: the part of the layer whose output is compared.
    """

    name: str
    before: str
    inspected: str


def scaled_inputs(layer: DecoderLayer) -> tuple[ScaledInput, ...]:
    """Return the inputs of a decoder layer in the order of the search."""
    before_mlp = "pre_feedforward_layernorm" if layer.post_norms else "post_attention_layernorm"
    return (
        ScaledInput("self_attn.q_proj", "input_layernorm", "self_attn"),
        ScaledInput("self_attn.o_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ScaledInput("mlp.gate_proj", before_mlp, "mlp"),
        ScaledInput("mlp.down_proj", "mlp.up_proj", "mlp.down_proj"),
    )


@torch.no_grad()
def quantize_by_awq(calibration: CalibrationLayer) -> dict[str, float]:
    """Scale the linear layers of `calibration.layer` and round them in turn; return the shares."""
    shares = scale_layer(calibration)
    quantize_by_gptq(calibration)
    return shares


@torch.no_grad()
def quantize_by_clipping(calibration: CalibrationLayer) -> dict[str, float]:
    """Scale, clip and round to the nearest, as published; return the shares found."""
    shares = scale_layer(calibration)
    for name in calibration.rounding.names:
        if not name.endswith(UNCLIPPED):
            clip(calibration, name)
    calibration.rounding.pack_layer(calibration.layer)
    return shares


@torch.no_grad()
def scale_layer(calibration: CalibrationLayer) -> dict[str, float]:
    """Scale the inputs of the linear layers of `calibration.layer`; return the shares found."""
    shares = {}
    names = set(calibration.rounding.names)
    for scaled in scaled_inputs(calibration.layer):
        if not names.issuperset(SHARED_INPUTS[scaled.name]):
            continue  # scales of layers that stay floats would change what they see for nothing
        share, scales = search_scales(calibration, scaled)
        shares[scaled.name] = share
        if share:
            apply_scales(calibration, scaled, scales)
    return shares


def search_scales(
    calibration: CalibrationLayer, scaled: ScaledInput
) -> tuple[float, Float[Tensor, " in"]]:
    """Return the share with the least error over the kept samples, and its scales."""
    seen = calibration.seen[scaled.name]
    mean = _per_source(calibration, scaled, seen.mean)
    wanted = [calibration.inspect(scaled.inspected, x) for x in seen.kept]
    weights = calibration.weight_of(scaled.inspected)
    best, best_error = (0.0, torch.ones_like(seen.mean)), torch.inf
    for share in SHARES:
        scales = scales_of(mean, share)
        if scaled.name == "self_attn.o_proj":
            scales = _for_query_heads(calibration, scales)
        error = 0.0
        with _Rounded(calibration, scaled.name, scales):
            for x, whole, weight in zip(seen.kept, wanted, weights, strict=True):
                missed = calibration.inspect(scaled.inspected, x / scales) - whole
                error += float((missed.square() * weight).sum())
                if error >= best_error:
                    break  # it only grows
        if error < best_error:
            best, best_error = (share, scales), error
    return best


def scales_of(mean: Float[Tensor, " in"], share: float) -> Float[Tensor, " in"]:
    """Return mean^share, scaled so that the largest and the least are each other's reciprocal."""
    scales = mean.pow(share).clamp(min=_LEAST)
    return scales / (scales.max() * scales.min()).sqrt()


def _per_source(calibration: CalibrationLayer, scaled: ScaledInput, mean: Tensor) -> Tensor:
    """Return the mean of each channel of what makes an input; query heads share their values."""
    if scaled.name != "self_attn.o_proj":
        return mean
    width = calibration.layer.self_attn.v_proj.out_features
    head = calibration.layer.self_attn.head_dim
    return mean.view(width // head, -1, head).mean(dim=1).flatten()


def _for_query_heads(calibration: CalibrationLayer, scales: Tensor) -> Tensor:
    head = calibration.layer.self_attn.head_dim
    repeats = calibration.layer.self_attn.o_proj.in_features // len(scales)
    return scales.view(-1, 1, head).expand(-1, repeats, -1).flatten()


class _Rounded:
    """Packed twins of the linear layers that see one input, for as long as it is entered."""

    def __init__(self, calibration: CalibrationLayer, name: str, scales: Tensor) -> None:
        layer, rounding = calibration.layer, calibration.rounding
        self._layer = layer
        self._plain = {one: linear_of(layer, one) for one in SHARED_INPUTS[name]}
        self._packed = {
            one: rounding.linear(rounding.pack(one, linear.weight * scales, linear.bias))
            for one, linear in self._plain.items()
        }

    def __enter__(self) -> None:
        for name, linear in self._packed.items():
            self._layer.set_submodule(name, linear)

    def __exit__(self, *_: object) -> None:
        for name, linear in self._plain.items():
            self._layer.set_submodule(name, linear)


def apply_scales(
    calibration: CalibrationLayer, scaled: ScaledInput, scales: Float[Tensor, " in"]
) -> None:
    """Move scales out of what makes an input and into the linear layers that see it.

    A norm's gain is kept in its number format, so what it is rounded by goes into the weights.
    """
    layer = calibration.layer
    before = layer.get_submodule(scaled.before)
    if isinstance(before, RMSNorm):
        gain = before.weight + before.offset
        kept = (gain / scales - before.offset).to(calibration.stored).float()
        new = kept + before.offset
        usable = (new != 0) & (gain != 0)
        scales = torch.where(usable, gain / torch.where(usable, new, 1.0), scales)
        before.weight = nn.Parameter(kept, requires_grad=False)
    else:
        source = linear_of(layer, scaled.before)
        rows = scales
        if scaled.name == "self_attn.o_proj":
            head = layer.self_attn.head_dim
            rows = scales.view(source.out_features // head, -1, head)[:, 0].flatten()
        source.weight.data /= rows[:, None]
        if source.bias is not None:
            source.bias.data /= rows
    for name in SHARED_INPUTS[scaled.name]:
        linear_of(layer, name).weight.data *= scales
    calibration.seen[scaled.name].divide(scales)


def clip(calibration: CalibrationLayer, name: str) -> None:
    """Cut the weights of every group of a row at the limit that makes its product most exact.

    The error is that of the group alone, over at most 512 positions.
    """
    rounding, linear = calibration.rounding, linear_of(calibration.layer, name)
    rows, width = linear.weight.shape
    group = rounding.scale_width(name, width)
    if rounding.bits_of(name) == 8 or width % group:
        return
    weight = linear.weight.view(rows, -1, group)
    grams = _grams(calibration, name, group)
    largest = weight.abs().amax(dim=-1, keepdim=True)
    best, best_error = weight, torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        limit = largest * shrink
        cut = torch.minimum(torch.maximum(weight, -limit), limit)
        packed = rounding.pack(name, cut.view(rows, width), None)
        missed = (packed.dequantize().view(rows, -1, group) - weight).transpose(0, 1)
        error = ((missed @ grams) * missed).sum(dim=-1, keepdim=True).transpose(0, 1)
        better = error < best_error
        best, best_error = torch.where(better, cut, best), torch.where(better, error, best_error)
    linear.weight.data = best.reshape(rows, width)


def _grams(
    calibration: CalibrationLayer, name: str, group: int
) -> Float[Tensor, "groups group group"]:
    """Return the sums of x x^T within every group of inputs, over a part of the positions."""
    key = next(first for first, names in SHARED_INPUTS.items() if name in names)
    inspected = next(one.inspected for one in scaled_inputs(calibration.layer) if one.name == key)
    x = torch.cat(calibration.seen[key].kept)
    weight = torch.cat(calibration.weight_of(inspected)).sqrt()
    step = max(1, len(x) // CLIP_POSITIONS)
    few = calibration.rounding.seen(x[::step]) * weight[::step]
    groups = few.view(len(few), -1, group).transpose(0, 1)  # [groups, M, group]
    return groups.transpose(1, 2) @ groups
