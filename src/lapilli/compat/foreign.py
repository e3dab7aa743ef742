"""The type of what programs for the original hand over and get back: whatever it is there."""

from typing import Any, TypeAlias

Foreign: TypeAlias = Any
"""An argument namespace, a tokenizer of another library, a tensor of any kind."""
