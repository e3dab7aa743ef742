"""Low-rank adapters as passes over a plain model: inject, then train, or merge."""

from lapilli.lora.inject import LoraConfig, LoraReport, adapter_tensors, inject, merge

__all__ = ["LoraConfig", "LoraReport", "adapter_tensors", "inject", "merge"]
