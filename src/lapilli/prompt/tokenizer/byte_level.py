"""The alphabet of byte-level BPE: how GPT-2, NeoX and Qwen write a byte as a visible character.

Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in
order. Source: GPT-2's encoder.py.
"""

from collections.abc import Mapping
from types import MappingProxyType

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def _alphabet() -> dict[str, int]:
    hidden = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


BYTE_OF: Mapping[str, int] = MappingProxyType(_alphabet())
"""Character of a token -> byte of the text."""
