"""How good an order of items is: NDCG, AUC, recall, reciprocal rank, hit rate, average precision.

Each function takes one query: the relevance of its items, 0 for an irrelevant one, and their
scores, of which the higher are the better.

    ties      NDCG is the mean over all orders of items with one score, AUC counts a tied pair as
              half; in the others tied items stay in the order in which they were given
    no value  a query without items, or without relevant ones, is NaN (AUC also one without
              irrelevant ones), and `mean` leaves it out. scikit-learn gives NDCG 0 there
    cut       with `k` only the best k items count

Numbers in, numbers out: knows numpy alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from lapilli.config.reader import shown
from lapilli.errors import ConfigError

Gain = Literal["linear", "exponential"]
Numbers = Sequence[float | int] | np.ndarray
NAN = math.nan


def ndcg(
    relevance: Numbers, scores: Numbers, k: int | None = None, *, gain: Gain = "linear"
) -> float:
    """Return the normalised discounted cumulative gain.

    Args:
        relevance: grades, at least 0.
        scores: one for each.
        k: only the best k count; None: all.
        gain: of a grade r: r, or 2^r - 1.

    Raises:
        ConfigError: lists that do not fit each other, or a value that is none.

    Source: Jarvelin and Kekalainen 2002; exponential gain: Burges et al. 2005; ties: McSherry and
        Najork 2008.
    """
    grades, given = _checked(relevance, scores, k)
    if gain not in ("linear", "exponential"):
        raise ConfigError(f"gain must be linear or exponential, got {shown(gain)}")
    gains = grades if gain == "linear" else np.exp2(grades) - 1
    if not gains.any():
        return NAN
    discounts = 1 / np.log2(np.arange(2, len(gains) + 2))
    discounts[len(gains) if k is None else k :] = 0
    best = float(np.sort(gains)[::-1] @ discounts)
    # All orders of tied items are as likely: each of them has the mean gain of its group.
    _, group = np.unique(-given, return_inverse=True)
    means = np.bincount(group, weights=gains) / np.bincount(group)
    discounted = np.bincount(np.sort(group), weights=discounts)
    return float(means @ discounted) / best


def auc(relevance: Numbers, scores: Numbers) -> float:
    """Return how likely a relevant item is before an irrelevant one: the area under the ROC curve.

    Raises:
        ConfigError: lists that do not fit each other, or a value that is none.
    """
    grades, given = _checked(relevance, scores, None)
    is_relevant = grades > 0
    positive, negative = int(is_relevant.sum()), int((~is_relevant).sum())
    if not positive or not negative:
        return NAN
    _, group, counts = np.unique(given, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # from 1, tied ones share their mean
    above = ranks[is_relevant].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def recall(
    relevance: Numbers, scores: Numbers, k: int | None = None, *, total: int | None = None
) -> float:
    """Return the share of relevant items that are among the best k.

    Args:
        relevance: above 0 for relevant items.
        scores: one for each.
        k: how many are looked at; None: all.
        total: relevant items there are, where some of them were not scored; None: those given.

    Raises:
        ConfigError: lists that do not fit each other, or a value that is none.
    """
    hits, total = _hits(relevance, scores, k, total)
    return float(hits[:k].sum() / total) if total else NAN


def hit_rate(relevance: Numbers, scores: Numbers, k: int | None = None) -> float:
    """Return 1 where a relevant item is among the best k, else 0.

    Raises:
        ConfigError: lists that do not fit each other, or a value that is none.
    """
    hits, total = _hits(relevance, scores, k, None)
    return float(hits[:k].any()) if total else NAN


def reciprocal_rank(relevance: Numbers, scores: Numbers, k: int | None = None) -> float:
    """Return 1 / the place of the first relevant item, 0 where none is among the best k.

    Raises:
        ConfigError: lists that do not fit each other, or a value that is none.
    """
    hits, total = _hits(relevance, scores, k, None)
    if not total:
        return NAN
    return 1 / (int(hits.argmax()) + 1) if hits[:k].any() else 0.0


def average_precision(
    relevance: Numbers, scores: Numbers, k: int | None = None, *, total: int | None = None
) -> float:
    """Return the mean precision at the places of relevant items, over all relevant ones.

    Args:
        relevance: above 0 for relevant items.
        scores: one for each.
        k: relevant items behind place k add nothing, but are counted; None: all are looked at.
        total: relevant items there are, where some of them were not scored; None: those given.

    Raises:
        ConfigError: lists that do not fit each other, or a value that is none.

    Source: trec_eval's map and map_cut.
    """
    hits, total = _hits(relevance, scores, k, total)
    if not total:
        return NAN
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float((precision * hits)[:k].sum() / total)


def mean(values: Iterable[float]) -> float:
    """Return the mean of the queries that have a value; NaN where none has."""
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else NAN


def evaluate(queries: Iterable[tuple[Numbers, Numbers]], k: int = 10) -> Mapping[str, float]:
    """Return the means of all metrics over queries, each as (relevance, scores).

    Raises:
        ConfigError: lists that do not fit each other, or a value that is none.
    """
    asked = list(queries)
    return {
        f"ndcg@{k}": mean(ndcg(*query, k) for query in asked),
        "auc": mean(auc(*query) for query in asked),
        f"recall@{k}": mean(recall(*query, k) for query in asked),
        f"hit_rate@{k}": mean(hit_rate(*query, k) for query in asked),
        "mrr": mean(reciprocal_rank(*query) for query in asked),
        "map": mean(average_precision(*query) for query in asked),
    }


def _hits(
    relevance: Numbers, scores: Numbers, k: int | None, total: int | None
) -> tuple[np.ndarray, int]:
    """Return which items are relevant from the best on, and how many relevant ones there are."""
    grades, given = _checked(relevance, scores, k)
    hits = grades[np.argsort(-given, kind="stable")] > 0
    there = int(hits.sum())
    if total is not None and total < there:
        raise ConfigError(f"total must be at least the {there} relevant items given, got {total}")
    return hits, there if total is None else total


def _checked(relevance: Numbers, scores: Numbers, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        grades, given = np.asarray(relevance, np.float64), np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"relevance and scores must be lists of numbers: {error}") from error
    if grades.ndim != 1 or grades.shape != given.shape:
        raise ConfigError(
            "relevance and scores must be two lists of one length, got shapes "
            f"{list(grades.shape)} and {list(given.shape)}"
        )
    if np.isnan(given).any():
        raise ConfigError(f"score {int(np.isnan(given).argmax())} is NaN, which has no place")
    is_wrong = ~(np.isfinite(grades) & (grades >= 0))
    if is_wrong.any():
        at = int(is_wrong.argmax())
        raise ConfigError(f"relevance must be finite and at least 0, got {grades[at]} at {at}")
    if k is not None and k < 1:
        raise ConfigError(f"k must be at least 1, got {k}")
    return grades, given
