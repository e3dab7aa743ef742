"""Modules without family names: attention, rotary positions, norms, MLPs, the KV cache."""
