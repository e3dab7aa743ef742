"""Intervals of 95 %: of means over queries or users, and of means over a few seeds.

interval, difference_interval, ratio_interval   the bootstrap: queries are drawn again
interval_of_seeds                               Student's t, for what a few trainings give
"""

import math
import statistics
from collections.abc import Sequence
from typing import Final

import numpy as np

DRAWS: Final = 10_000
# Student's t for 95 %, by the number of seeds; more of them are near 2.
_T: Final = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of values [n] and the ends of its 95 % interval."""
    means = values[_drawn(len(values), seed)].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def ratio_interval(
    values: np.ndarray, others: np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the ratio of two means over the same queries, and the ends of its 95 % interval."""
    drawn = _drawn(len(values), seed)
    low, high = np.quantile(values[drawn].mean(1) / others[drawn].mean(1), (0.025, 0.975))
    return float(values.mean() / others.mean()), float(low), float(high)


def _drawn(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(DRAWS, count))


def difference_interval(
    values: np.ndarray, others: np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean difference over the same queries, and the ends of its 95 % interval."""
    return interval(values - others, seed=seed)


def interval_of_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some seeds and the half width of its interval of 95 %; nan of one."""
    count = len(values)
    if count < 2:
        return values[0], math.nan
    half = _T.get(count, 2.6) * statistics.stdev(values) / math.sqrt(count)
    return statistics.mean(values), half
