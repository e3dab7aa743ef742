"""Intervals of queries and of seeds."""

import math

import numpy as np
import pytest

from comparison.intervals import (
    difference_interval,
    interval,
    interval_of_seeds,
    ratio_interval,
)


def test_intervals_hold_their_means_and_pair_their_queries():
    values = np.random.default_rng(0).random(50)
    mean, low, high = interval(values)
    assert low < mean == values.mean() < high
    assert ratio_interval(values * 0.5, values) == pytest.approx((0.5, 0.5, 0.5))
    assert difference_interval(values + 0.25, values) == pytest.approx((0.25, 0.25, 0.25))


def test_an_interval_is_as_wide_as_the_spread_of_means():
    mean, low, high = interval(np.repeat([0.0, 1.0], 200))
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)


def test_seeds_have_the_interval_of_students_t():
    mean, half = interval_of_seeds([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval_of_seeds([1.0])[1])
