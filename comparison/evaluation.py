"""The evaluation of next films: ranks among all films, figures of users, and the file of results.

scores of all films --ranks_of--> how many stand before the right one --of_users--> HR, NDCG
figures of users    --Results---> means, intervals, differences: comparison/results/userllm.json
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from comparison.intervals import interval
from comparison.movies import Movies
from lapilli.datasets.interactions import Interactions

K: Final = 10
Scores = Callable[[Interactions], np.ndarray]
"""From what is known of all users to the scores of all films, float [users, films]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How many films stand before the right one, of every user, and what an answer costs.

    Attributes:
        validation: ranks, int64 [users].
        test: likewise.
        cost: positions of a request, its operations, and the like, by name.
    """

    validation: np.ndarray
    test: np.ndarray
    cost: Mapping[str, float] = field(default_factory=dict)


def measured(movies: Movies, scores: Scores, **cost: float) -> Measured:
    """Return the ranks of validation and test."""
    split = movies.split
    return Measured(
        validation=ranks_of(scores(split.train), split.train, split.validation),
        test=ranks_of(scores(split.before_test), split.before_test, split.test),
        cost=cost,
    )


def validation_ndcg(movies: Movies, scores: Scores) -> float:
    """Return the mean NDCG of the validation, by which all choices are made."""
    split = movies.split
    ranks = ranks_of(scores(split.train), split.train, split.validation)
    return float(of_users(ranks)["ndcg"].mean())


def ranks_of(scores: np.ndarray, known: Interactions, held_out: Interactions) -> np.ndarray:
    """Return the ranks of held-out films, as `baselines.next_item_ranks` does one by one."""
    found = []
    for user, row in enumerate(np.array(scores, dtype=np.float64)):
        target = held_out.history(user)
        if len(target):
            own = row[target[0]]
            row[known.history(user)] = -np.inf
            found.append(int((row >= own).sum()) - 1)
    return np.array(found, dtype=np.int64)


def of_users(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return hit rate and NDCG of every user at K, with one right film each."""
    found = ranks < K
    return {"hit": found.astype(np.float64), "ndcg": np.where(found, 1 / np.log2(ranks + 2.0), 0)}


class Results:
    """The rows so far, written to a file after each of them.

    Args:
        path: of the result.
        movies: the data.
        others: rows that every later one is compared with, user by user.
        name: of the data.
        window: last events of a user that are read.
        options: sizes and steps, for the page.
    """

    def __init__(
        self,
        path: Path,
        movies: Movies,
        others: Sequence[str],
        *,
        name: str,
        window: int,
        options: Mapping[str, float],
    ) -> None:
        self._path, self._others = path, others
        self._users: dict[str, dict[str, np.ndarray]] = {}
        split = movies.split
        self.found: dict[str, Any] = {
            "data": {
                "name": name,
                "users": len(split.test.user_ids),
                "films": movies.num_films,
                "events": sum(map(len, (split.train, split.validation, split.test))),
                "window": window,
            },
            "options": dict(options),
            "rows": {},
            "seconds": {},
        }

    def add(self, name: str, runs: Sequence[Measured]) -> None:
        """Add a row of one or several seeds, and write the file."""
        every = [of_users(run.test) for run in runs]
        users = {m: np.mean([one[m] for one in every], axis=0) for m in ("hit", "ndcg")}
        held = [of_users(run.validation) for run in runs]
        self._users[name] = users
        row: dict[str, Any] = {
            "test": {m: interval(values) for m, values in users.items()},
            "validation": {m: float(np.mean([one[m] for one in held])) for m in users},
            "each seed": [{m: float(one[m].mean()) for m in users} for one in every],
            "seeds": len(runs),
            "cost": dict(runs[0].cost),
            "against": {
                other: {m: interval(users[m] - self._users[other][m]) for m in users}
                for other in self._others
                if other in self._users and other != name
            },
        }
        self.found["rows"][name] = row
        self.write()
        hit, ndcg = (row["test"][m][0] for m in ("hit", "ndcg"))
        _say(f"{name}: HR@{K} {hit:.4f}, NDCG@{K} {ndcg:.4f}")

    def write(self) -> None:
        """Write what there is."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
