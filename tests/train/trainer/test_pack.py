import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.train.trainer.batch import pack


def test_long_samples_come_first_and_short_ones_fill_the_rows():
    assert pack([300, 900, 400, 700, 600], 1024) == [[1], [3, 0], [4, 2]]


def test_a_sample_that_fills_the_rest_of_a_row_exactly_goes_into_it():
    assert pack([60, 40], 100) == [[0, 1]]
    assert pack([100], 100) == [[0]]


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 250))
def test_every_sample_is_in_one_row_that_has_room(lengths, room):
    bins = pack(lengths, room)
    assert sorted(i for numbers in bins for i in numbers) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in numbers) for numbers in bins]
    assert all(used <= room for used in sums)
    assert sum(used <= room / 2 for used in sums) <= 1  # two of those would have been one


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match="sample of 30 positions does not fit into a row of 20"):
        pack([3, 30], 20)
