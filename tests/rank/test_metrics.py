"""Metrics of orders equal scikit-learn's on random cases; ties and empty lists as documented."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    label_ranking_average_precision_score,
    ndcg_score,
    recall_score,
    roc_auc_score,
)

from lapilli.errors import ConfigError
from lapilli.rank.metrics import (
    auc,
    average_precision,
    evaluate,
    hit_rate,
    mean,
    ndcg,
    recall,
    reciprocal_rank,
)

GRADES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=2, max_size=12)
CUT = st.none() | st.integers(1, 15)


def split(pairs):
    grades, scores = (np.array(x, dtype=float) for x in zip(*pairs, strict=True))
    return grades, scores


def distinct(grades, seed):
    return np.random.default_rng(seed).permutation(len(grades)).astype(float)


@given(GRADES, CUT)
def test_ndcg_with_ties(pairs, k):
    grades, scores = split(pairs)
    assume(grades.any())
    assert ndcg(grades, scores, k) == pytest.approx(ndcg_score([grades], [scores], k=k))
    powers = 2**grades - 1
    expected = ndcg_score([powers], [scores], k=k)
    assert ndcg(grades, scores, k, gain="exponential") == pytest.approx(expected)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(1, 4))
def test_ndcg_of_tied_items_is_the_mean_over_their_orders(grades, k):
    assume(any(grades))
    orders = [ndcg(grades, scores, k) for scores in itertools.permutations([3.0, 2.0, 1.0, 0.0])]
    assert ndcg(grades, [1.0] * 4, k) == pytest.approx(sum(orders) / len(orders))


@given(GRADES)
def test_auc_with_ties(pairs):
    grades, scores = split(pairs)
    is_relevant = grades > 0
    assume(is_relevant.any() and not is_relevant.all())
    assert auc(grades, scores) == pytest.approx(roc_auc_score(is_relevant, scores))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(0, 99), CUT)
def test_the_others_without_ties(grades, seed, k):
    is_relevant = np.array(grades) > 0
    assume(is_relevant.any())
    scores = distinct(grades, seed)
    best = np.zeros(len(grades), dtype=bool)
    best[np.argsort(-scores)[:k]] = True
    found = recall(grades, scores, k)
    assert found == pytest.approx(recall_score(is_relevant, best))
    assert hit_rate(grades, scores, k) == float(found > 0)
    assert average_precision(grades, scores) == pytest.approx(
        average_precision_score(is_relevant, scores)
    )
    first = np.zeros(len(grades), dtype=int)  # of one relevant item the precision is 1 / its place
    first[max(np.flatnonzero(is_relevant), key=lambda i: scores[i])] = 1
    expected = label_ranking_average_precision_score([first], [scores])
    is_seen = k is None or expected >= 1 / k - 1e-9
    assert reciprocal_rank(grades, scores, k) == pytest.approx(expected if is_seen else 0)


def test_average_precision_is_cut_over_all_relevant_items():
    relevance, scores = [1, 0, 1, 1], [4, 3, 2, 1]
    assert average_precision(relevance, scores, 3) == pytest.approx((1 + 2 / 3) / 3)
    assert average_precision(relevance, scores, total=6) == pytest.approx((1 + 2 / 3 + 3 / 4) / 6)
    assert recall(relevance, scores, 2, total=4) == 0.25


def test_tied_items_stay_as_they_were_given():
    assert reciprocal_rank([0, 1], [1, 1]) == 0.5
    assert reciprocal_rank([1, 0], [1, 1]) == 1
    assert hit_rate([0, 1], [1, 1], 1) == 0
    assert average_precision([0, 1, 1], [2, 2, 2]) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    "metric", [ndcg, auc, recall, hit_rate, reciprocal_rank, average_precision]
)
def test_what_has_no_value_is_nan(metric):
    assert math.isnan(metric([], []))
    assert math.isnan(metric([0, 0], [1, 2]))


def test_without_irrelevant_items_there_is_no_auc():
    assert math.isnan(auc([1, 2], [1, 2]))


def test_means_leave_out_queries_without_a_value():
    found = evaluate([([1, 0], [2.0, 1.0]), ([0, 0], [1.0, 2.0]), ([0, 1], [2.0, 1.0])], k=1)
    assert found == {
        "ndcg@1": 0.5,
        "auc": 0.5,
        "recall@1": 0.5,
        "hit_rate@1": 0.5,
        "mrr": 0.75,
        "map": 0.75,
    }
    assert math.isnan(mean([]))
    assert math.isnan(mean([math.nan]))


def test_infinite_scores_have_a_place():
    assert auc([0, 1], [-math.inf, math.inf]) == 1


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        (([1], [1, 2]), {}, r"two lists of one length, got shapes \[1\] and \[2\]"),
        ((np.ones((1, 1)), np.ones((1, 1))), {}, "two lists of one length"),
        (([1, 0], [1, math.nan]), {}, "score 1 is NaN"),
        (([1, -1], [1, 2]), {}, r"at least 0, got -1.0 at 1"),
        (([1, math.inf], [1, 2]), {}, "finite and at least 0"),
        (([1], [1], 0), {}, "k must be at least 1, got 0"),
        (([1, 1], [1, 2]), {"total": 1}, "total must be at least the 2 relevant items"),
    ],
)
def test_wrong_values_are_named(given, options, text):
    with pytest.raises(ConfigError, match=text):
        recall(*given, **options)
