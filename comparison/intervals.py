"""Intervals of means over queries, by drawing the queries again (the bootstrap)."""

import numpy as np

DRAWS = 10_000


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
