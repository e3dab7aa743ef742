"""Baselines: what each of them ranks first where that can be told by hand."""

import numpy as np
import pytest

from comparison.baselines import (
    SequenceOptions,
    bm25,
    hit_rate,
    item_knn,
    ndcg,
    next_item_ranks,
    popularity,
    sequence_scores,
    train_sequence_model,
)
from lapilli.datasets.interactions import from_table, leave_one_out
from lapilli.datasets.tables import Table


def taken(*histories):
    rows = [
        (str(user), item, float(time))
        for user, history in enumerate(histories)
        for time, item in enumerate(history)
    ]
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    columns = {"user_id": users, "item_id": items, "timestamp": np.array(times)}
    return from_table(Table("t", columns))


def test_popularity_counts_and_knn_follows_the_last_items():
    train = taken("ab", "ab", "cd", "abe")
    names = train.item_ids
    assert names[int(np.argmax(popularity(train)(np.array([0]))))] in "ab"
    score = item_knn(train)
    history = np.array([names.index("c")])
    assert names[int(np.argmax(score(history)))] == "d"


def test_ranks_leave_out_what_was_taken_and_put_ties_first():
    every = taken("abc", "bca")
    split = leave_one_out(every)
    scores = np.zeros(len(every.item_ids))
    ranks = next_item_ranks(lambda _history: scores, split.train, split.test)
    np.testing.assert_array_equal(ranks, [1, 1])  # two of three are left, both tied
    assert (hit_rate(ranks, 1), hit_rate(ranks, 2)) == (0.0, 1.0)
    assert ndcg(ranks, 2) == pytest.approx(1 / np.log2(3))
    assert ndcg(np.array([0, 9]), 5) == pytest.approx(0.5)


def test_a_sequence_model_learns_what_follows():
    every = taken(*["abcdabcdabcd"[i : i + 8] for i in range(4)] * 4)
    options = SequenceOptions(
        width=16, layers=1, length=8, epochs=30, batch=8, dropout=0.0, lr=1e-2
    )
    score = sequence_scores(train_sequence_model(every, options))
    for before, after in zip("abcd", "bcda", strict=True):
        history = np.array([every.item_ids.index(before)])
        assert every.item_ids[int(np.argmax(score(history)))] == after


def test_bm25_finds_the_words():
    pytest.importorskip("bm25s")
    score = bm25(["wings bend in wind", "heat flows slowly", "a plate of steel"])
    assert int(np.argmax(score("what makes heat flow slowly"))) == 1
