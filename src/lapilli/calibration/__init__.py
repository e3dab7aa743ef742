"""Quantization from samples: what passes a model decides how its weights are rounded."""

from lapilli.calibration.run import CalibrationOptions, quantize_from_samples

__all__ = ["CalibrationOptions", "quantize_from_samples"]
