"""Low-rank adapters as passes over a plain model: inject, then train, or merge."""

from lapilli.lora.config import LoraConfig
from lapilli.lora.inject import LoraReport, adapter_tensors, inject, merge

__all__ = ["LoraConfig", "LoraReport", "adapter_tensors", "inject", "merge"]
