"""Films, their features and who watched what: MovieLens-100k, or a small generated catalogue.

    ml-100k.inter, ml-100k.item --read_movies--> Movies --leave one out--> train | validation | test
    a history --events--> {"film": [..], "genres": [..], ..}     for an encoder of events
              --words---> film_50 star wars (1975) *5 ..           for a language model

Films are numbered as in the interactions; in events they begin at 1, because 0 stands for unknown.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lapilli.datasets.interactions import (
    Interactions,
    Split,
    from_table,
    leave_one_out,
    read_interactions,
)
from lapilli.datasets.tables import Table, read_table

NAME: Final = "ml-100k"
ADVICE: Final = (
    f"MovieLens-100k is not in {{folder}}: put {NAME}.inter and {NAME}.item (RecBole's files of "
    "it) there, or name another folder by --data or LAPILLI_DATA"
)
RATINGS: Final = 5
Numbers = Sequence[int] | Sequence[float] | np.ndarray
_FIRST_YEAR: Final = 1920
_YEARS: Final = 5  # years of films that are told apart no further


@dataclass(frozen=True, slots=True, kw_only=True)
class Movies:
    """A catalogue and the histories of users over it.

    Attributes:
        split: the last event of every user is the test, the one before the validation.
        titles: words of every film.
        genres: numbers of every film's, from 1.
        num_genres: how many there are.
        years: of every film's span of years a number from 1; 0: unknown.
    """

    split: Split
    titles: tuple[tuple[str, ...], ...]
    genres: tuple[tuple[int, ...], ...]
    num_genres: int
    years: tuple[int, ...]

    @property
    def num_films(self) -> int:
        """Return how many films there are."""
        return len(self.titles)

    def events(self, films: Numbers, ratings: Numbers) -> dict[str, list[Any]]:
        """Return a history as an encoder of events reads it; see `categorical`."""
        return {
            "film": [int(film) + 1 for film in films],
            "genres": [list(self.genres[int(film)]) for film in films],
            "year": [self.years[int(film)] for film in films],
            "rating": [int(rating) for rating in ratings],
        }

    def categorical(self, width: int) -> list[dict[str, Any]]:
        """Return the features of an event, the film as a vector of this width."""
        small = max(2, width // 4)
        most = max(map(len, self.genres), default=1)
        return [
            {"name": "film", "size": self.num_films + 1, "width": width},
            {"name": "genres", "size": self.num_genres + 1, "width": small, "most": most},
            {"name": "year", "size": max(self.years) + 1, "width": small},
            {"name": "rating", "size": RATINGS + 1, "width": small},
        ]

    def words(self, films: Numbers, ratings: Numbers) -> list[str]:
        """Return a history as words: of every event the film, its title, and the rating."""
        return [
            word
            for film, rating in zip(films, ratings, strict=True)
            for word in (film_word(int(film)), *self.titles[int(film)], rating_word(int(rating)))
        ]

    def vocabulary(self) -> list[str]:
        """Return all words of histories: the films first, in their order."""
        films = [film_word(number) for number in range(self.num_films)]
        ratings = [rating_word(number) for number in range(RATINGS + 1)]
        return films + ratings + sorted({word for title in self.titles for word in title})


def film_word(film: int) -> str:
    """Return the word that stands for a film."""
    return f"film_{film}"


def rating_word(rating: int) -> str:
    """Return the word for a rating; title words are never written so."""
    return f"*{rating}"


def data_folder(given: str | None = None) -> Path:
    """Return where the data lie: as given, as LAPILLI_DATA says, or beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(given or os.environ.get("LAPILLI_DATA") or beside)


def read_movies(folder: Path) -> Movies | None:
    """Read MovieLens-100k from RecBole's files in `folder`/ml-100k; None where they are missing."""
    inter, item = (folder / NAME / f"{NAME}.{ending}" for ending in ("inter", "item"))
    if not (inter.is_file() and item.is_file()):
        return None
    interactions, table = read_interactions(inter), read_table(item)
    rows = {name: row for row, name in enumerate(table.texts("item_id"))}
    order = [rows[name] for name in interactions.item_ids]
    titles, classes = table.lists("movie_title"), table.lists("class")
    names = sorted({name for row in order for name in classes[row]})
    years = table.texts("release_year")
    return Movies(
        split=leave_one_out(interactions),
        titles=tuple(tuple(word.lower() for word in titles[row]) for row in order),
        genres=tuple(tuple(1 + names.index(name) for name in classes[row]) for row in order),
        num_genres=len(names),
        years=tuple(_span_of(years[row]) for row in order),
    )


def _span_of(year: str) -> int:
    """Return the number of a film's span of years; 0 where the year is none."""
    return 1 + max(0, (int(year) - _FIRST_YEAR) // _YEARS) if year.isdigit() else 0


def generated_movies(users: int, films: int, *, seed: int = 0) -> Movies:
    """Return histories in which a film is mostly followed by the next but two that is left.

    Popularity knows nothing of that, and a model of sequences can.
    """
    rng = np.random.default_rng([seed, 5])
    rows: list[tuple[str, str, float, float]] = []
    for user in range(users):
        left, film = set(range(films)), int(rng.integers(films))
        for time in range(int(rng.integers(6, max(7, films // 2)))):
            left.remove(film)
            rows.append((f"u{user}", f"f{film}", float(rng.integers(1, RATINGS + 1)), float(time)))
            wanted = film + 3 if rng.random() < 0.9 else int(rng.integers(films))
            film = min(left, key=lambda one: (one - wanted) % films)
    names, items, ratings, times = (list(column) for column in zip(*rows, strict=True))
    columns: dict[str, Any] = {"user_id": names, "item_id": items}
    columns |= {"rating": np.array(ratings), "timestamp": np.array(times)}
    interactions: Interactions = from_table(Table("generated", columns))
    numbers = [int(name[1:]) for name in interactions.item_ids]
    return Movies(
        split=leave_one_out(interactions),
        titles=tuple(("the", f"word{number % 7}", f"word{number // 7}") for number in numbers),
        genres=tuple(
            (1 + number % 3,) if number % 4 else (1 + number % 3, 4) for number in numbers
        ),
        num_genres=4,
        years=tuple(number % 5 for number in numbers),
    )
