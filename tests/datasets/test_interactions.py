"""Interactions and their splits."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.datasets.interactions import (
    Interactions,
    from_table,
    leave_one_out,
    read_interactions,
    split_by_time,
)
from lapilli.datasets.tables import Table
from lapilli.errors import DataError

EVENTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("uvwxyz"), st.integers(0, 5)),
    min_size=1,
    max_size=60,
)


def of(events: list[tuple[str, str, int]]) -> Interactions:
    users, items, times = (list(column) for column in zip(*events, strict=True))
    stamps = np.array(times, dtype=np.float64)
    return from_table(Table("t", {"user_id": users, "item_id": items, "timestamp": stamps}))


@given(EVENTS)
def test_every_event_is_kept_in_the_order_of_its_user(events: list[tuple[str, str, int]]) -> None:
    found = of(events)
    assert len(found) == len(events)
    for number, user in enumerate(found.user_ids):
        own = [(time, item) for name, item, time in events if name == user]
        expected = [item for _, item in sorted(own, key=lambda pair: pair[0])]  # sorted is stable
        assert [found.item_ids[i] for i in found.history(number)] == expected
    assert found.counts().sum() == len(events)


@given(EVENTS)
def test_leave_one_out_takes_the_last_two_of_users_with_three(
    events: list[tuple[str, str, int]],
) -> None:
    every = of(events)
    split = leave_one_out(every)
    for user in range(len(every.user_ids)):
        whole = every.history(user).tolist()
        parts = [
            part.history(user).tolist() for part in (split.train, split.validation, split.test)
        ]
        assert list(itertools.chain(*parts)) == whole
        assert [len(part) for part in parts[1:]] == ([1, 1] if len(whole) >= 3 else [0, 0])
        assert split.before_test.history(user).tolist() == whole[: len(whole) - len(parts[2])]


@given(EVENTS)
def test_a_split_by_time_never_learns_from_later_events(events: list[tuple[str, str, int]]) -> None:
    every = of(events)
    split = split_by_time(every, validation=0.2, test=0.3)
    parts = (split.train, split.validation, split.test)
    assert sum(map(len, parts)) == len(every)
    ends = [(part.times.min(), part.times.max()) for part in parts if len(part)]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))


def test_shares_of_everything_are_refused() -> None:
    with pytest.raises(DataError, match="together below 1"):
        split_by_time(of([("a", "u", 1)]), validation=0.5, test=0.5)


def test_ratings_are_read_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "r.inter"
    path.write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t5\t3\t20\n1\t6\t4\t10\n",
        encoding="utf-8",
    )
    found = read_interactions(path)
    assert [found.item_ids[i] for i in found.items] == ["6", "5"]
    assert found.ratings.tolist() == [4, 3]
    assert read_interactions(path, rating=None).ratings.tolist() == [1, 1]


@pytest.mark.parametrize("missing", ["user_id", "item_id", "timestamp"])
def test_a_file_without_a_column_is_refused(tmp_path: Path, missing: str) -> None:
    names = [name for name in ("user_id", "item_id", "timestamp") if name != missing]
    path = tmp_path / "r.inter"
    path.write_text("\t".join(f"{n}:token" for n in names) + "\n1\t2\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"no column '{missing}'"):
        read_interactions(path)


def test_an_asked_for_rating_must_be_there_and_rows_too(tmp_path: Path) -> None:
    path = tmp_path / "r.inter"
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    path.write_text(head, encoding="utf-8")
    with pytest.raises(DataError, match="has no rows"):
        read_interactions(path)
    path.write_text(head + "1\t2\t3\n", encoding="utf-8")
    with pytest.raises(DataError, match="no column 'stars'"):
        read_interactions(path, rating="stars")
