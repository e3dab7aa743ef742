"""Weights in 4 or 8 bits: a pass over a plain model."""

from lapilli.quant.config import QuantConfig, quant_config
from lapilli.quant.quantize import QuantReport, quantize

__all__ = ["QuantConfig", "QuantReport", "quant_config", "quantize"]
