"""Generated shop: items with attributes, texts from a grammar, and queries with known grades.

    attributes --grammar--> a long description | a summary | a query
    query, item --wanted values that it has--> grade 0..4: the best order is known, its NDCG is 1

An item is one value for each attribute. A description names every value once, in a sentence of its
own, between sentences that say nothing; a summary names them in a line. Everything is a function
of the seed.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "kind": ("chair", "lamp", "table", "shelf", "clock", "mirror", "rug", "stool"),
    "colour": ("red", "blue", "green", "black", "white", "yellow", "brown", "grey"),
    "material": ("oak", "steel", "glass", "cotton", "bamboo", "marble", "copper", "wool"),
    "style": ("modern", "rustic", "classic", "plain", "baroque", "nordic", "coastal", "urban"),
    "room": ("kitchen", "bedroom", "garden", "office", "hall", "bathroom", "nursery", "studio"),
    "size": ("tiny", "small", "medium", "large", "huge", "narrow", "wide", "tall"),
}
OTHER_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "kind": ("seat", "lantern", "desk", "rack", "timepiece", "glassware", "carpet", "perch"),
    "colour": ("crimson", "azure", "emerald", "ebony", "ivory", "golden", "chestnut", "silver"),
    "material": ("timber", "iron", "crystal", "linen", "cane", "stone", "bronze", "fleece"),
    "style": (
        "sleek",
        "rural",
        "timeless",
        "simple",
        "ornate",
        "arctic",
        "maritime",
        "metropolitan",
    ),
    "room": ("galley", "dormitory", "yard", "study", "corridor", "washroom", "playroom", "atelier"),
    "size": ("minute", "little", "average", "big", "giant", "slim", "broad", "lofty"),
}
"""Words for the same values, which queries say and texts do not."""
NAMES: Final = tuple(ATTRIBUTES)
ASKED: Final = 4
"""Attributes of a query; grades go from 0 to this."""

_SENTENCES: Final[dict[str, tuple[str, ...]]] = {
    "kind": ("This is a {}.", "What you see here is a {}.", "We sell it as a {}."),
    "colour": ("Its colour is {}.", "It comes in {}.", "The makers painted it {}."),
    "material": ("It is made of {}.", "The body is {}.", "They built it from {}."),
    "style": ("The style is {}.", "People call its looks {}.", "It has a {} design."),
    "room": ("It belongs in the {}.", "Put it into your {}.", "Most people keep it in the {}."),
    "size": ("It is {} for what it is.", "In size it is {}.", "You will find that it is {}."),
}
_SAYINGS: Final = (
    "It arrives within a week.",
    "Customers come back for more.",
    "Clean it with a soft cloth.",
    "The price has not changed for years.",
    "A family in the mountains makes it by hand.",
    "It fits through every door.",
    "You may return it within a month.",
    "The newspaper wrote about it last spring.",
    "There are only few of them left.",
    "It weighs less than it seems.",
    "Our shop has sold it since the beginning.",
    "No tools are needed to set it up.",
)
_QUERIES: Final = (
    "I am looking for something {}.",
    "Find me something {}.",
    "Do you have anything {}?",
)
_ASKED: Final = {
    "kind": "that is a {}",
    "colour": "in {}",
    "material": "made of {}",
    "style": "with a {} design",
    "room": "for the {}",
    "size": "of {} size",
}


@dataclass(frozen=True, slots=True)
class Item:
    """An item: the number of its value for each of NAMES."""

    number: int
    values: tuple[int, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """Return its values as words."""
        return tuple(ATTRIBUTES[name][v] for name, v in zip(NAMES, self.values, strict=True))


@dataclass(frozen=True, slots=True)
class Query:
    """What somebody asks for: numbers of attributes, each with the number of its value."""

    number: int
    wanted: tuple[tuple[int, int], ...]
    text: str

    def grade(self, item: Item) -> int:
        """Return how many of the wanted values the item has."""
        return sum(item.values[name] == value for name, value in self.wanted)


def draw_items(count: int, seed: int) -> list[Item]:
    """Draw items, every value at random."""
    rng = np.random.default_rng([seed, 1])
    sizes = [len(values) for values in ATTRIBUTES.values()]
    return [Item(n, tuple(map(int, rng.integers(sizes)))) for n in range(count)]


def description(item: Item, *, fillers: int, seed: int = 0) -> str:
    """Return a text in which every value stands once, among sentences that say nothing.

    Args:
        item: what is described.
        fillers: sentences that say nothing; a sentence has about seven words.
        seed: of the wording.
    """
    rng = np.random.default_rng([seed, 2, item.number])
    sentences = [
        str(rng.choice(_SENTENCES[name])).format(word)
        for name, word in zip(NAMES, item.words, strict=True)
    ]
    sentences += [str(saying) for saying in rng.choice(_SAYINGS, size=fillers)]
    return " ".join(sentences[i] for i in rng.permutation(len(sentences)))


def summary(item: Item) -> str:
    """Return the values as one line."""
    return ", ".join(item.words)


def draw_queries(count: int, items: list[Item], seed: int) -> list[Query]:
    """Draw queries for ASKED values of an item each, so that at least one item has all of them.

    Half of the values are asked for by OTHER_WORDS.
    """
    rng = np.random.default_rng([seed, 3])
    queries = []
    for n in range(count):
        item = items[int(rng.integers(len(items)))]
        names = sorted(map(int, rng.choice(len(NAMES), size=ASKED, replace=False)))
        wanted = tuple((name, item.values[name]) for name in names)
        parts = [
            _ASKED[NAMES[name]].format((ATTRIBUTES, OTHER_WORDS)[asks][NAMES[name]][v])
            for (name, v), asks in zip(wanted, rng.integers(2, size=ASKED), strict=True)
        ]
        text = str(rng.choice(_QUERIES)).format(", ".join(parts[i] for i in rng.permutation(ASKED)))
        queries.append(Query(n, wanted, text))
    return queries


def candidates(query: Query, items: list[Item], count: int, seed: int) -> list[Item]:
    """Return items to rank: half of them the best of all, half drawn at random, in random order.

    Among items at random hardly any has more than one wanted value, and a ranker would be judged
    by what it puts behind the tenth place.
    """
    rng = np.random.default_rng([seed, 4, query.number])
    grades = np.array([query.grade(item) for item in items])
    order = np.argsort(-grades + rng.random(len(items)) * 0.5)
    best, rest = order[: count // 2], order[count // 2 :]
    chosen = [*best, *rng.choice(rest, size=count - len(best), replace=False)]
    return [items[i] for i in rng.permutation(chosen)]
