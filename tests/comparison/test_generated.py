"""The generated shop: what is drawn is a function of the seed, and grades are what texts say."""

import re

import numpy as np
import pytest

from comparison.generated import (
    ASKED,
    ATTRIBUTES,
    OTHER_WORDS,
    candidates,
    description,
    draw_items,
    draw_queries,
    summary,
)


def test_the_same_seed_draws_the_same():
    items = draw_items(50, 3)
    assert items == draw_items(50, 3) != draw_items(50, 4)
    assert draw_queries(5, items, 1) == draw_queries(5, items, 1) != draw_queries(5, items, 2)


@pytest.mark.parametrize("fillers", [0, 20])
def test_a_description_names_every_value_once(fillers):
    for item in draw_items(30, 0):
        words = description(item, fillers=fillers).lower().replace(".", "").split()
        own = [word for words in ATTRIBUTES.values() for word in words]
        assert sorted(word for word in words if word in own) == sorted(item.words)
        assert summary(item) == ", ".join(item.words)


def test_a_query_has_an_item_with_all_that_it_wants():
    items = draw_items(200, 0)
    for query in draw_queries(20, items, 0):
        assert max(query.grade(item) for item in items) == ASKED
        for name, value in query.wanted:
            words = [list(each.values())[name][value] for each in (ATTRIBUTES, OTHER_WORDS)]
            assert sum(word in re.findall(r"\w+", query.text) for word in words) == 1


def test_half_of_the_values_are_asked_for_by_other_words_that_no_text_says():
    others = [word for words in OTHER_WORDS.values() for word in words]
    own = [word for words in ATTRIBUTES.values() for word in words]
    assert len({*own, *others}) == len(own) + len(others) == 96
    items = draw_items(100, 0)
    said = [
        word for query in draw_queries(100, items, 0) for word in re.findall(r"\w+", query.text)
    ]
    assert 0.4 < sum(word in others for word in said) / (100 * ASKED) < 0.6


def test_half_of_the_candidates_are_the_best_of_all():
    items = draw_items(300, 0)
    [query] = draw_queries(1, items, 0)
    chosen = candidates(query, items, 20, 0)
    assert len({item.number for item in chosen}) == 20
    best = np.sort([query.grade(item) for item in items])[::-1][:10]
    found = np.sort([query.grade(item) for item in chosen])[::-1][:10]
    np.testing.assert_array_equal(found, best)
