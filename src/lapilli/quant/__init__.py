"""Weights in 4 or 8 bits: a pass over a plain model."""

from lapilli.quant.quantize import QuantConfig, QuantReport, quant_config, quantize

__all__ = ["QuantConfig", "QuantReport", "quant_config", "quantize"]
