"""Handwritten digits from scikit-learn's UCI set; the only file that imports scikit-learn.

1,797 scans of 8 x 8 pixels. A fixed permutation keeps a fifth of them away from every training
picture.
"""

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

_SPLIT_SEED: Final = 20240519
_HELD_OUT_SHARE: Final = 0.2


@lru_cache(maxsize=1)
def digit_scans() -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """Return scans as uint8 [1797, 8, 8] with ink 0 to 255, and their values."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    ink = np.clip(np.round(np.asarray(bundle.images) * (255.0 / 16.0)), 0, 255).astype(np.uint8)
    ink.setflags(write=False)
    return ink, tuple(int(value) for value in bundle.target)


@lru_cache(maxsize=1)
def digit_split() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Row indices for training (80 %) and held out (20 %), the same in every process."""
    count = len(digit_scans()[1])
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    held_out = round(count * _HELD_OUT_SHARE)
    return tuple(map(int, order[held_out:])), tuple(map(int, order[:held_out]))
