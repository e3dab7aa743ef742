"""Interactions: which user took which item when, and the splits that recommenders are judged by.

    rows of a table --codes, sorted by user and time--> Interactions --> train | validation | test

Users and items are numbered from 0 in the order of their first appearance in the table.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from lapilli.datasets.tables import Table, read_table
from lapilli.errors import DataError

USER: Final = "user_id"
ITEM: Final = "item_id"
TIME: Final = "timestamp"
RATING: Final = "rating"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactions:
    """Events of users, one user after the other, each in the order of time.

    Attributes:
        user_ids: the name of every user.
        item_ids: the name of every item.
        users: number of the user of each event, int64 [n], ascending.
        items: number of the item of each event, int64 [n].
        times: float64 [n], in the unit of the data.
        ratings: float64 [n]; ones where the data has none.
    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray
    _starts: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts = np.searchsorted(self.users, np.arange(len(self.user_ids) + 1))
        object.__setattr__(self, "_starts", starts)

    def __len__(self) -> int:
        return len(self.users)

    def of_user(self, user: int) -> slice:
        """Return where the events of a user are."""
        return slice(int(self._starts[user]), int(self._starts[user + 1]))

    def history(self, user: int) -> np.ndarray:
        """Return the items of a user in order, int64 [events]."""
        found: np.ndarray = self.items[self.of_user(user)]
        return found

    def counts(self) -> np.ndarray:
        """Return how often each item was taken, int64 [items]."""
        return np.bincount(self.items, minlength=len(self.item_ids))

    def select(self, rows: np.ndarray) -> "Interactions":
        """Return the events that a mask [n] or ascending indices name, of the same users."""
        return Interactions(
            user_ids=self.user_ids,
            item_ids=self.item_ids,
            users=self.users[rows],
            items=self.items[rows],
            times=self.times[rows],
            ratings=self.ratings[rows],
        )


@dataclass(frozen=True, slots=True)
class Split:
    """Events to learn from, to choose by, and to be judged by, of the same users and items."""

    train: Interactions
    validation: Interactions
    test: Interactions

    @property
    def before_test(self) -> Interactions:
        """Return what is known when the test is asked: the events of train and validation."""
        parts = (self.train, self.validation)
        users, items, times, ratings = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("users", "items", "times", "ratings")
        )
        order = np.argsort(users, kind="stable")  # those of validation are the later ones
        return Interactions(
            user_ids=self.train.user_ids,
            item_ids=self.train.item_ids,
            users=users[order],
            items=items[order],
            times=times[order],
            ratings=ratings[order],
        )


def read_interactions(
    path: str | Path,
    *,
    user: str = USER,
    item: str = ITEM,
    time: str = TIME,
    rating: str | None = RATING,
) -> Interactions:
    """Read interactions from a file of RecBole, a Parquet file, or a folder of Parquet.

    Args:
        path: for instance ml-100k.inter.
        user: name of the column of users.
        item: likewise of items.
        time: of the times, which only have to be in order.
        rating: of ratings; None: none are read. A table need not have the usual one.

    Raises:
        DataError: the file cannot be read, has no rows, or lacks a column.
    """
    return from_table(read_table(path), user=user, item=item, time=time, rating=rating)


def from_table(
    table: Table,
    *,
    user: str = USER,
    item: str = ITEM,
    time: str = TIME,
    rating: str | None = RATING,
) -> Interactions:
    """Make interactions of a table; see `read_interactions`.

    Events of one user at one time stay in the order of the table.
    """
    if not len(table):
        raise DataError(f"{table.name} has no rows: expected one for each interaction")
    user_ids, users = _numbered(table.texts(user))
    item_ids, items = _numbered(table.texts(item))
    times = table.numbers(time)
    has_ratings = rating is not None and (rating in table.columns or rating != RATING)
    ratings = table.numbers(rating) if rating and has_ratings else np.ones(len(times))
    order = np.lexsort((np.arange(len(times)), times, users))
    return Interactions(
        user_ids=user_ids,
        item_ids=item_ids,
        users=users[order],
        items=items[order],
        times=times[order],
        ratings=ratings[order],
    )


def _numbered(names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names in the order of their first appearance, and the number of each row's."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(name, len(numbers)) for name in names]
    return tuple(numbers), np.array(found, dtype=np.int64)


def leave_one_out(interactions: Interactions) -> Split:
    """Keep the last event of every user for the test and the one before for validation.

    Users of fewer than three events are learned from and not judged by.
    """
    left = np.empty(len(interactions), dtype=np.int64)  # events of the same user after this one
    for user in range(len(interactions.user_ids)):
        events = interactions.of_user(user)
        number = events.stop - events.start
        left[events] = np.arange(number)[::-1] if number >= 3 else 2
    return Split(*(interactions.select(rows) for rows in (left >= 2, left == 1, left == 0)))


def split_by_time(
    interactions: Interactions, *, validation: float = 0.1, test: float = 0.1
) -> Split:
    """Keep the latest events of all users together for the test, those before for validation.

    Args:
        interactions: all of them.
        validation: share of the events.
        test: likewise.

    Raises:
        DataError: shares that leave nothing to learn from.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise DataError(
            f"shares of validation {validation} and test {test}: expected none below 0, and "
            "together below 1"
        )
    begin, middle = np.quantile(interactions.times, (1 - validation - test, 1 - test))
    times = interactions.times
    rows = (times <= begin, (times > begin) & (times <= middle), times > middle)
    return Split(*(interactions.select(part) for part in rows))
