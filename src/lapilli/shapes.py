"""Shapes: the letters of every shape in lapilli, and the annotations that use them.

    B rows          T positions of a row (text and media)      S positions in a KV cache
    D width of the language model       V vocabulary            L layers
    Q query heads   K key/value heads   A width of one head
    N tiles or media items              P patches of one tile   E width of an encoder
    C H W channels, height, width of pixels

A single letter needs a leading space in an annotation: Float[Tensor, " D"].
The annotations are documentation in production and are checked in the tests (tests/conftest.py).
"""

from jaxtyping import Bool, Float, Int, Int8, UInt8
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Int8", "Tensor", "UInt8"]
