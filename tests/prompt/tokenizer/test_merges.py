"""The merges of a vocabulary are all cuts whose halves are pieces, in their order."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lapilli.prompt.tokenizer.merges import merges

TEXTS = st.text("ab", max_size=7) | st.text("a\u2581\u00e9\U0001f600\ud800", max_size=4) | st.text()


def plain_merges(scores, ids):
    """One piece after the other, cut at every place."""
    ranked = []
    for piece, score in scores.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        cuts = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        ranked += [(score, cut) for cut in sorted(cuts, key=lambda cut: ids[cut[0]])]
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    return [cut for _, cut in ranked]


@pytest.mark.slow
@given(
    st.dictionaries(TEXTS, st.sampled_from([-2.0, -1.0, 0.0]) | st.floats(-9, 9), max_size=40),
    st.lists(TEXTS, max_size=9),
    st.randoms(),
)
@example({}, [], None)
@example({"": 0.0}, [], None)
def test_merges_are_those_of_the_plain_way(scores, more, order):
    known = list(dict.fromkeys([*scores, *more]))
    if order is not None:
        order.shuffle(known)
    ids = {text: number for number, text in enumerate(known)}
    assert merges(scores, ids) == plain_merges(scores, ids)


def test_halves_go_by_the_id_of_the_first():
    scores = {"a": -3.0, "b": -2.0, "ab": -1.0, "ba": -1.0, "aba": 0.0}
    ids = {text: number for number, text in enumerate(["ab", "a", "b", "ba", "aba"])}
    assert merges(scores, ids) == [("ab", "a"), ("a", "ba"), ("a", "b"), ("b", "a")]
