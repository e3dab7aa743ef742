"""The index: public keys, and both ways of searching find what a dict finds."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.store import index
from lapilli.store.index import DEAD, UNKNOWN, Segment, find, keys_of, merge

Keys = st.integers(0, 300) | st.integers(0, 2**64 - 1)


def segment_of(places):
    keys = np.array(sorted(places), "<u8")
    return Segment(keys, np.array([places[key] for key in keys.tolist()], "<i8"))


def test_keys_are_blake2b():
    digest = hashlib.blake2b("straße".encode(), digest_size=8).digest()
    assert keys_of(["straße".encode()]).tolist() == [int.from_bytes(digest, "little")]
    assert keys_of([]).dtype == np.uint64


@pytest.mark.parametrize("few", [0, 1 << 18])
@given(
    st.lists(st.dictionaries(Keys, st.integers(-1, 99), min_size=1, max_size=200), max_size=3),
    st.lists(Keys, max_size=50),
)
def test_segments_are_dicts_of_which_the_newest_counts(few, places, asked):
    segments = [segment_of(one) for one in reversed(places)]
    together = {}
    for one in places:
        together.update(one)
    asked = np.array([*asked, *list(together)[:50]], "<u8")
    expected = [together.get(key, UNKNOWN) for key in asked.tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_FEW", few)
        assert find(segments, asked).tolist() == expected
        if segments:
            one = merge(segments, oldest=False)
            assert one.find(asked).tolist() == expected
            assert [one.find_one(key) for key in asked] == expected
            alive = merge(segments, oldest=True)
            assert dict(zip(alive.keys.tolist(), alive.places.tolist(), strict=True)) == {
                key: place for key, place in together.items() if place != DEAD
            }
