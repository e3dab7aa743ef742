"""Names of tensors in files and names of parameters in lapilli: tables, and the walk over them."""

from lapilli.checkpoint.keymaps.rules import KeyMap
from lapilli.checkpoint.keymaps.tables import (
    HF_LLAVA,
    LANGUAGE_MODEL,
    ORIGINAL,
    ORIGINAL_MPT,
    VISION_TOWER,
    original_keymap,
)

__all__ = [
    "HF_LLAVA",
    "LANGUAGE_MODEL",
    "ORIGINAL",
    "ORIGINAL_MPT",
    "VISION_TOWER",
    "KeyMap",
    "original_keymap",
]
