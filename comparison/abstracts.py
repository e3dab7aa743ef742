"""Cranfield's abstracts and queries: what is learned from, what is ranked, and how it is judged.

    titles, sentences of abstracts --> queries that answer themselves    (no judgement is read)
    225 queries of people --permutation--> 50 to learn from, 25 for choices, 150 of the test

Ranked are the first hundred of BM25. Knows texts and judgements; must not know models.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from comparison.baselines import bm25
from lapilli.datasets.retrieval import Document, Retrieval, read_smart
from lapilli.rank.metrics import ndcg
from lapilli.rank.mixlm import RankingExample

FIRST: Final = 100  # texts that are reranked
FILES: Final = ("cran.all.1400", "cran.qry", "cranqrel")
ADVICE: Final = (
    "Cranfield is not in {folder}: put " + ", ".join(FILES) + " there, or name another folder by "
    "--data or LAPILLI_DATA"
)
_BEST: Final = 4.0  # the highest grade
_HARD: Final = (3, FIRST)  # places of BM25's order that a query's own text is told apart from
_TITLES: Final = 0.6  # share of queries that are titles, the rest are sentences
_WEIGHTS: Final = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Sizes of the parts of the queries; the test has the rest.

    Attributes:
        train: whose judgements are learned from.
        validation: on which weights and settings are chosen.
        words: of an abstract that are read, its title among them.
        seed: of the permutation of the queries, and of what is drawn.
    """

    train: int = 50
    validation: int = 25
    words: int = 32
    seed: int = 0


def read_cranfield(folder: Path) -> Retrieval | None:
    """Read the collection from `folder`; None where a file of it is missing.

    The judgements of -1 are left out, as `read_smart` says, so their texts have the grade 0.
    """
    paths = [folder / name for name in FILES]
    return read_smart(*paths) if all(path.is_file() for path in paths) else None


class Abstracts:
    """A collection with its queries in three parts.

    Attributes:
        names: of the texts; those with no word are left out.
        texts: title and abstract, cut.
        queries: text by name.

    Args:
        found: what was read.
        parts: sizes.
    """

    def __init__(self, found: Retrieval, parts: Parts) -> None:
        self.parts = parts
        known = {name: one for name, one in found.documents.items() if one.whole.strip()}
        self.names, self._documents = list(known), list(known.values())
        self._places = {name: place for place, name in enumerate(self.names)}
        self.texts = [self._cut(one.whole) for one in self._documents]
        self._bodies = [self._cut(_body(one)) for one in self._documents]
        self.words = bm25([one.whole for one in self._documents])
        self.queries, self._judgements = found.queries, found.judgements
        order = np.random.default_rng(parts.seed).permutation(len(self.queries))
        names = [list(self.queries)[place] for place in order]
        judged = [name for name in names if self._judgements.get(name)]
        chosen = parts.train + parts.validation
        self.train, self.validation = judged[: parts.train], judged[parts.train : chosen]
        self.test = judged[chosen:]
        self._titled = [place for place, one in enumerate(self._documents) if _has_both(one)]
        self._sentences = [
            (place, sentence)
            for place, one in enumerate(self._documents)
            for sentence in sentences_of(_body(one))
            if sentence[:20] not in self.texts[place]
        ]

    def pairs(self, count: int, seed: int = 1) -> list[tuple[str, int, str]]:
        """Return queries made of abstracts, the place of what they answer, and its text.

        A title is asked for the abstract without it, and a sentence for the beginning of its
        abstract, in which it does not stand.
        """
        rng = np.random.default_rng([self.parts.seed, seed])
        found = []
        for _ in range(count):
            if not self._sentences or rng.random() < _TITLES:
                place = self._titled[int(rng.integers(len(self._titled)))]
                query = self._documents[place].title.rstrip(" .")
                found.append((query, place, self._bodies[place]))
            else:
                place, query = self._sentences[int(rng.integers(len(self._sentences)))]
                found.append((query, place, self.texts[place]))
        return found

    def made_examples(self, count: int, seed: int = 2) -> list[RankingExample]:
        """Return examples of queries made of abstracts: the own text, one like it, and any one."""
        rng = np.random.default_rng([self.parts.seed, seed])
        found: list[RankingExample] = []
        for query, place, text in self.pairs(-(-count // 3), seed):
            texts = self.texts if text == self.texts[place] else self._bodies
            order = np.argsort(-self.words(query), kind="stable")
            order = order[order != place]
            low, high = (min(one, len(order) - 1) for one in _HARD)
            near = order[int(rng.integers(low, high + 1))]
            far = order[int(rng.integers(len(order)))]
            found.append(RankingExample(query, text, 1.0))
            found += [RankingExample(query, texts[int(one)], 0.0) for one in (near, far)]
        return found[:count]

    def judged_examples(self, names: Sequence[str], seed: int = 3) -> list[RankingExample]:
        """Return examples of these queries: what is judged, and twice as much of BM25's first."""
        rng = np.random.default_rng([self.parts.seed, seed])
        found: list[RankingExample] = []
        for name in names:
            query, judged = self.queries[name], self._judgements[name]
            places = [self._places[one] for one in judged if one in self._places]
            others = [place for place in self.first(query) if self.names[place] not in judged]
            chosen = rng.permutation(others)[: 2 * len(places)]
            found += [
                RankingExample(query, self.texts[one], judged[self.names[one]] / _BEST)
                for one in places
            ]
            found += [RankingExample(query, self.texts[int(one)], 0.0) for one in chosen]
        return found

    def examples(self, count: int, seed: int = 2) -> list[RankingExample]:
        """Return examples of both kinds, those of the judged queries once, in random order."""
        judged = self.judged_examples(self.train)[:count]
        found = judged + self.made_examples(count - len(judged), seed)
        order = np.random.default_rng([self.parts.seed, seed, 1]).permutation(count)
        return [found[place] for place in order]

    def first(self, query: str) -> np.ndarray:
        """Return the places of the texts that BM25 has first, the best first."""
        return np.argsort(-self.words(query), kind="stable")[:FIRST]

    def ndcg(self, name: str, scores: np.ndarray) -> float:
        """Return NDCG@10 of a query of which BM25's first texts have these scores."""
        every = np.full(len(self.names), -np.inf)
        every[self.first(self.queries[name])] = scores
        judged = self._judgements[name]
        return ndcg([judged.get(one, 0) for one in self.names], every, 10, gain="exponential")

    def _cut(self, text: str) -> str:
        return " ".join(text.split()[: self.parts.words])


Scores = dict[str, np.ndarray]
"""By the name of a query, scores of BM25's first texts."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of a ranker, and how much they weigh beside BM25's.

    Attributes:
        of: the collection.
        scores: of the queries of validation and test.
        weight: of standardized scores, the rest is of BM25's; 1: the ranker alone.
    """

    of: Abstracts
    scores: Scores
    weight: float = 1.0

    def ndcgs(self, names: Sequence[str]) -> np.ndarray:
        """Return NDCG@10 of these queries, float [names]."""
        return np.array([self.of.ndcg(name, self._mixed(name)) for name in names])

    def beside_bm25(self) -> "Ranking":
        """Return it with the weight that is best for the queries of the validation."""
        ways = [Ranking(self.of, self.scores, weight) for weight in _WEIGHTS]
        return max(ways, key=lambda way: float(way.ndcgs(self.of.validation).mean()))

    def _mixed(self, name: str) -> np.ndarray:
        query = self.of.queries[name]
        words = standard(self.of.words(query)[self.of.first(query)])
        return (1 - self.weight) * words + self.weight * standard(self.scores[name])


def scored(of: Abstracts, score: Callable[[str, np.ndarray], np.ndarray]) -> Ranking:
    """Return the ranking by a function from a query and places of texts to their scores."""
    names = (*of.validation, *of.test)
    asked = {name: of.queries[name] for name in names}
    return Ranking(of, {name: score(text, of.first(text)) for name, text in asked.items()})


def standard(scores: np.ndarray) -> np.ndarray:
    """Return scores with mean 0 and deviation 1."""
    found: np.ndarray = (scores - scores.mean()) / max(float(scores.std()), 1e-9)
    return found


def sentences_of(text: str, least: int = 8, most: int = 30) -> list[str]:
    """Return the sentences of so many words; Cranfield parts a full stop from its word."""
    found = [one.strip() for one in re.split(r" \.(?: |$)", text)]
    return [one for one in found if least <= len(one.split()) <= most]


def _body(document: Document) -> str:
    """Return a text without the title that begins it; the title where there is nothing else."""
    return document.text.removeprefix(document.title).strip() or document.title


def _has_both(document: Document) -> bool:
    return bool(document.title and document.text.removeprefix(document.title).strip())
