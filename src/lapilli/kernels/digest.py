"""Digests of many short texts: BLAKE2b with 8 bytes, compiled, and in Python where nothing is.

Source: RFC 7693.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from lapilli.kernels.library import native

_BLAKE: Final = hashlib.blake2b(digest_size=8)
_FEW: Final = 4
"""Texts for which the call alone would take longer than Python."""


def digests(texts: Sequence[bytes]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """Return the digests of texts, each as a little-endian number, uint64 [n]."""
    library = native() if len(texts) > _FEW else None
    if library is None:
        return plain_digests(texts)
    ends = np.fromiter(map(len, texts), np.int64, len(texts)).cumsum()
    found = np.empty(len(texts), "<u8")
    library.functions.lapilli_digests(
        b"".join(texts), ends.ctypes.data, len(texts), found.ctypes.data
    )
    return found


def plain_digests(texts: Sequence[bytes]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """Return what `digests` does, text by text."""
    found, copy = [], _BLAKE.copy
    for one in texts:
        digest = copy()
        digest.update(one)
        found.append(digest.digest())
    return np.frombuffer(b"".join(found), "<u8")
