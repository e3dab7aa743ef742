"""Quantization of a decoder, one layer after another, from samples that pass it.

    samples before layer i --observe--> inputs of its linear layers --method--> packed layer i
          '---------------------------> samples before layer i + 1

One layer is in float32 at a time. Where weights are rounded in turn (gptq.py), the next layer sees
what the packed one gives, and can make up for it too; else what the float layer gives, as AWQ's
authors do.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.lm.decoder import Decoder, DecoderLayer
from lapilli.model import VisionLanguageModel
from lapilli.nn.linear import FloatLinear
from lapilli.quant.activations import (
    CalibrationLayer,
    Rounding,
    Sample,
    float_copy,
    linear_names,
)
from lapilli.quant.awq import quantize_by_awq, quantize_by_clipping
from lapilli.quant.gptq import quantize_by_gptq
from lapilli.quant.linear import QuantLinear
from lapilli.quant.sensitivity import Weights


@dataclass(frozen=True, slots=True)
class Method:
    """A way to round the weights of a layer that knows what passes it.

    Attributes:
        quantize: packs the linear layers of `CalibrationLayer.layer`; returns what it chose.
        in_turn: weights are rounded in turn, by second moments of the inputs.
        needs_gradients: positions count by their gradients.
    """

    quantize: Callable[[CalibrationLayer], Mapping[str, float]]
    in_turn: bool = True
    needs_gradients: bool = False


METHODS: Mapping[str, Method] = {
    "gptq": Method(quantize_by_gptq),
    "awq": Method(quantize_by_awq),
    "awq-clip": Method(quantize_by_clipping, in_turn=False),
    "mbq": Method(quantize_by_awq, needs_gradients=True),
}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """The outcome for one layer.

    Attributes:
        index: of the layer.
        error_before: squared error of the layer's update, relative to it, of plain rounding; 0
            where there are no samples.
        error: of what was chosen.
        seconds: that it took.
        is_plain: plain rounding was better and is what the layer has.
        choices: of the method, such as AWQ's share of each input.
    """

    index: int
    error_before: float
    error: float
    seconds: float
    is_plain: bool = False
    choices: Mapping[str, float] = field(default_factory=dict)


def decoder_of(model: VisionLanguageModel) -> Decoder:
    """Return the language model.

    Raises:
        UnsupportedModelError: its layers are not those of a Llama-shaped decoder.
        ConfigError: some of them are packed or have adapters.
    """
    decoder = model.language_model
    if not isinstance(decoder, Decoder):
        raise UnsupportedModelError(
            "only Llama-shaped language models are quantized from samples: choose the method rtn"
        )
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError(
            "the model is quantized already: quantize the checkpoint that it was made from"
        )
    if decoder.cross_attention:
        raise UnsupportedModelError(
            "layers are rounded from samples one after the other, without the gated "
            "cross-attention that this model has between them: choose the method rtn"
        )
    for index, layer in enumerate(decoder.model.layers):
        for name in linear_names():
            if type(layer.get_submodule(name)) not in (nn.Linear, FloatLinear):
                raise ConfigError(
                    f"layer {index}: {name} is no plain linear layer: fold the model's adapter in "
                    "before, lapilli.lora.merge(model)"
                )
    return decoder


@torch.no_grad()
def quantize_layer(
    decoder: Decoder,
    index: int,
    samples: Sequence[Sample],
    method: str,
    rounding: Rounding,
    *,
    weights: Weights | None = None,
    stored: torch.dtype | None = None,
) -> LayerReport:
    """Pack the linear layers of one layer, and take the samples past it; both in place.

    Args:
        decoder: whose layers before this one are done.
        index: of the layer.
        samples: before this layer, and afterwards behind it.
        method: of METHODS.
        rounding: of the linear layers.
        weights: of positions, see sensitivity.py.
        stored: number format of the norms; None: as they are.

    Raises:
        ConfigError: NaN among the activations, or a weight that cannot be rounded.
    """
    start = time.perf_counter()
    layer = decoder.layer(index)
    calibration = CalibrationLayer(decoder, index, samples, rounding, weights)
    calibration.stored = stored or calibration.stored
    chosen = METHODS[method]
    calibration.observe(gram=chosen.in_turn)
    nearest = calibration.rounded_to_nearest()
    before = calibration.error(nearest)
    choices = chosen.quantize(calibration)
    error, best = calibration.error(calibration.layer), calibration.layer
    is_plain = not error <= before  # NaN too
    if is_plain:
        error, best = before, nearest
    outputs = calibration.outputs
    if chosen.in_turn:
        outputs = [calibration.run(best, sample.hidden) for sample in samples]
    for sample, out in zip(samples, outputs, strict=True):
        sample.hidden = out
    put_back(layer, best, calibration.stored)
    return LayerReport(index, before, error, time.perf_counter() - start, is_plain, dict(choices))


@torch.no_grad()
def round_layer(
    decoder: Decoder, index: int, rounding: Rounding, *, stored: torch.dtype | None = None
) -> LayerReport:
    """Pack the linear layers of one layer by plain rounding, in place, without any sample."""
    start = time.perf_counter()
    layer = decoder.layer(index)
    copied = float_copy(layer, torch.device("cpu"))
    rounding.pack_layer(copied)
    put_back(layer, copied, stored or layer.input_layernorm.weight.dtype)
    return LayerReport(index, 0.0, 0.0, time.perf_counter() - start, is_plain=True)


def put_back(layer: DecoderLayer, packed: DecoderLayer, stored: torch.dtype) -> None:
    """Give a layer the packed linear layers and the norms of its copy."""
    for name in linear_names():
        layer.set_submodule(name, packed.get_submodule(name).to("cpu"))
    for name, parameter in packed.named_parameters():
        path, _, kind = name.rpartition(".")
        plain = nn.Parameter(parameter.detach().to("cpu", stored), requires_grad=False)
        setattr(layer.get_submodule(path), kind, plain)
