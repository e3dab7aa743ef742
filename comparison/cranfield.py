"""Cranfield: abstracts reranked behind BM25 by a text ranker and by an embedding ranker.

abstracts -> sentences as queries -> a judge without labels -> stages II and III
queries   -> BM25's first hundred -> rankers, alone and beside BM25's score -> NDCG@10
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from comparison.baselines import bm25
from comparison.intervals import difference_interval, interval, ratio_interval
from comparison.language_model import (
    Sizes,
    latent_semantics,
    token_counts,
    weigh,
    write_language_model,
)
from comparison.rankers import (
    ITEM,
    TEMPLATE,
    Course,
    Record,
    open_chat,
    taught,
    train_mixed,
    train_reasoning,
    train_text,
)
from lapilli.datasets.retrieval import Retrieval, read_smart
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker, YesNo
from lapilli.rank.metrics import ndcg
from lapilli.rank.mixlm import RankingExample
from lapilli.store import Store
from lapilli.store.encode import TextEncoder, build_store

FIRST: Final = 100  # texts that are reranked
_QUERY_WORDS, _ASKED_WORDS = 16, 8  # of a record of stage I


@dataclass(frozen=True, slots=True, kw_only=True)
class CranfieldPlan:
    """Sizes, courses, and the split of the queries."""

    sizes: Sizes = field(default_factory=lambda: Sizes(vocabulary=6000, layers=2))
    meanings: int = 96
    validation: int = 75
    reasoning: Course = field(default_factory=lambda: Course(steps=160, batch=48))
    text: Course = field(default_factory=lambda: Course(steps=120, batch=48))
    mixed: Course = field(default_factory=lambda: Course(steps=100, batch=48))
    seed: int = 0


def read_cranfield(folder: Path) -> Retrieval:
    """Read the collection.

    Raises:
        DataError: a file is missing.
    """
    return read_smart(folder / "cran.all.1400", folder / "cran.qry", folder / "cranqrel")


class Collection:
    """The texts, the queries in two parts, and a judge that has seen no judgement.

    The judge's grade of a title is how far it stands above the others for a query: the mean of the
    z-scores of BM25 and of latent semantics, as a probability.

    Args:
        found: what was read.
        plan: sizes and split.
        tokens: from a text to token ids, which latent semantics counts.
        vocabulary: how many tokens there are.

    Source: for a judge without labels, Dehghani et al. 2017 (arXiv 1704.08803).
    """

    def __init__(
        self,
        found: Retrieval,
        plan: CranfieldPlan,
        tokens: Callable[[str], list[int]],
        vocabulary: int,
    ) -> None:
        self.plan, self._tokens, self._vocabulary = plan, tokens, vocabulary
        known = {name: one for name, one in found.documents.items() if one.whole.strip()}
        self.names, whole = list(known), [one.whole for one in known.values()]
        self.titles = [one.title or " ".join(one.text.split()[:12]) for one in known.values()]
        self.queries, self._judgements = found.queries, found.judgements
        self.words, self.title_words = bm25(whole), bm25(self.titles)
        counts = token_counts([tokens(text) for text in whole], vocabulary)
        self._documents = (counts > 0).sum(0)
        _, self._meanings = latent_semantics(counts, plan.meanings)
        self._vectors = np.concatenate([self._meaning(title) for title in self.titles])
        order = np.random.default_rng(plan.seed).permutation(len(self.queries))
        names = [list(self.queries)[i] for i in order]
        self.validation, self.test = names[: plan.validation], names[plan.validation :]
        self._sentences = [(at, one) for at, text in enumerate(whole) for one in sentences_of(text)]

    def meaning(self, query: str) -> np.ndarray:
        """Return the cosine of a query with every title, by latent semantics."""
        found: np.ndarray = self._vectors @ self._meaning(query)[0]
        return found

    def judge(self, query: str) -> np.ndarray:
        """Return probabilities of all titles."""
        above = (standard(self.title_words(query)) + standard(self.meaning(query))) / 2
        found: np.ndarray = 1 / (1 + np.exp(3.0 - above))
        return found

    def records(self, count: int) -> list[Record]:
        """Return sentences and words that stand in them or in another one: does the word?"""
        rng = np.random.default_rng([self.plan.seed, 2])
        found: list[Record] = []
        for _ in range(count):
            (_, query), (_, other) = (
                self._sentences[int(i)] for i in rng.integers(len(self._sentences), size=2)
            )
            inside, outside = query.split()[:_QUERY_WORDS], other.split()
            record = [(f"query: {' '.join(inside)}\nitem:", False)]
            for _ in range(_ASKED_WORDS):
                some = inside if rng.random() < 0.5 else outside
                word = some[int(rng.integers(len(some)))]
                record += [(word, False), ("yes" if word in inside else "no", True)]
            found.append(record)
        return found

    def examples(self, count: int) -> list[RankingExample]:
        """Return sentences with titles of other texts, and the judge's probabilities."""
        rng = np.random.default_rng([self.plan.seed, 1])
        found: list[RankingExample] = []
        while len(found) < count:
            at, sentence = self._sentences[int(rng.integers(len(self._sentences)))]
            labels = self.judge(sentence)
            order = np.argsort(-labels)
            order = order[order != at]
            places = [int(rng.integers(low, high)) for low, high in _bounds(len(order))]
            found += [
                RankingExample(sentence, self.titles[i], float(labels[i])) for i in order[places]
            ]
        return found[:count]

    def _meaning(self, text: str) -> np.ndarray:
        """Return the unit vector of a text, [1, width]."""
        counts = token_counts([self._tokens(text)], self._vocabulary)
        vector = weigh(counts, self._documents, len(self.titles)) @ self._meanings
        found: np.ndarray = vector / np.linalg.norm(vector, axis=1, keepdims=True).clip(1e-9)
        return found

    def first(self, query: str) -> np.ndarray:
        """Return the places of the texts that BM25 has first, the best first."""
        return np.argsort(-self.words(query), kind="stable")[:FIRST]

    def ndcg(self, name: str, scores: np.ndarray) -> float:
        """Return NDCG@10 of a query of which BM25's first texts have these scores."""
        every = np.full(len(self.names), -np.inf)
        every[self.first(self.queries[name])] = scores
        judged = self._judgements[name]
        return ndcg([judged.get(one, 0) for one in self.names], every, 10, gain="exponential")


def _bounds(count: int) -> list[tuple[int, int]]:
    """Return between which places of a judge's order the titles of a sentence are drawn."""
    ends = (0, 3, 10, 30, 100, 300)
    bounds = [
        (min(low, count - 1), min(high, count)) for low, high in itertools.pairwise((*ends, count))
    ]
    return [*bounds, *bounds[:2]]


def standard(scores: np.ndarray) -> np.ndarray:
    """Return scores with mean 0 and deviation 1."""
    return (scores - scores.mean()) / max(float(scores.std()), 1e-9)


def sentences_of(text: str, least: int = 6, most: int = 40) -> list[str]:
    """Return the sentences of so many words."""
    found = [one.strip() for one in re.split(r" \.(?: |$)", text)]
    return [one for one in found if least <= len(one.split()) <= most]


LEXICAL, MEANING = "BM25", "latent semantics of titles"
TEXT, EMBEDDING = "text ranker", "embedding ranker"
WEIGHTS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of a ranker beside BM25 that validation chooses from."""


class CranfieldComparison:
    """Trains both rankers on what the judge says, and measures them on queries held out.

    Args:
        found: the collection.
        plan: sizes and courses.
        folder: where checkpoints and the store go.
        save: called with the result after every part.
    """

    def __init__(
        self,
        found: Retrieval,
        plan: CranfieldPlan,
        folder: Path,
        save: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.plan, self.folder, self._save = plan, folder, save
        whole = [one.whole for one in found.documents.values() if one.whole.strip()]
        said = [TEMPLATE.user.format(query="", item="yes no")] * 20  # as words of their own
        fresh = write_language_model(
            folder / "fresh", [*whole, *said], plan.sizes, meanings=plan.meanings, seed=plan.seed
        )
        tokenizer = open_chat(fresh).tokenizer
        self.collection = Collection(found, plan, tokenizer.encode, tokenizer.vocab_size)
        self.found: dict[str, Any] = {"rows": {}, "seconds": {}, "weights": {}}
        self.found["queries"] = {
            "validation": len(self.collection.validation),
            "test": len(self.collection.test),
        }
        self._ndcgs: dict[str, np.ndarray] = {}

    def run(self) -> dict[str, Any]:
        """Return rows of quality and seconds of training."""
        of, plan, seconds = self.collection, self.plan, self.found["seconds"]
        self._row(LEXICAL, lambda query, first: of.words(query)[first])
        self._rows("BM25 of titles", lambda query, first: of.title_words(query)[first])
        self._rows(MEANING, lambda query, first: of.meaning(query)[first])
        start, text = self.folder / "stage1", self.folder / "text"
        records = of.records(plan.reasoning.examples)
        seconds["stage I"] = train_reasoning(self.folder / "fresh", start, records, plan.reasoning)
        examples = of.examples(plan.text.examples)
        seconds[TEXT] = train_text(start, text, examples, plan.text)
        self._rows(TEXT, self._text_scores(text))
        examples = taught(text, of.examples(plan.mixed.examples))
        seconds[EMBEDDING] = train_mixed(text, self.folder / "mixed", examples, plan.mixed)
        self._rows(EMBEDDING, self._stored_scores(self.folder / "mixed"))
        return self.found

    def _text_scores(self, folder: Path) -> Callable[[str, np.ndarray], np.ndarray]:
        ranker = Ranker(open_chat(folder), template=TEMPLATE, score=YesNo(difference=True))
        titles = self.collection.titles
        return lambda query, first: ranker.score(query, [titles[i] for i in first]).numpy()

    def _stored_scores(self, folder: Path) -> Callable[[str, np.ndarray], np.ndarray]:
        chat, path = open_chat(folder), folder.with_name("store")
        encoder = TextEncoder(chat.model, chat.tokenizer, modality=ITEM)
        names = self.collection.names
        build_store(path, zip(names, self.collection.titles, strict=True), encoder)
        chat.stores[ITEM] = Store(path)
        ranker = Ranker(chat, template=TEMPLATE, score=YesNo(difference=True))
        items = [MediaPart(name, ITEM) for name in names]
        return lambda query, first: ranker.score(query, [items[i] for i in first]).numpy()

    def _rows(self, name: str, score: Callable[[str, np.ndarray], np.ndarray]) -> None:
        """Measure a ranker alone, and beside BM25 with the weight that validation chooses."""
        of = self.collection
        kept = {
            one: score(of.queries[one], of.first(of.queries[one]))
            for one in (*of.validation, *of.test)
        }
        by_query = {of.queries[one]: scores for one, scores in kept.items()}

        def beside(weight: float) -> Callable[[str, np.ndarray], np.ndarray]:
            return lambda query, first: (
                (1 - weight) * standard(of.words(query)[first]) + weight * standard(by_query[query])
            )

        found = {
            weight: float(np.mean(self._each(beside(weight), of.validation))) for weight in WEIGHTS
        }
        best = max(found, key=lambda weight: found[weight])
        self.found["weights"][name] = best
        self._row(name, beside(1.0))
        self._row(f"{name} and BM25", beside(best))

    def _each(self, score: Callable[[str, np.ndarray], np.ndarray], names: list[str]) -> np.ndarray:
        of = self.collection
        asked = [(name, of.queries[name]) for name in names]
        return np.array([of.ndcg(name, score(text, of.first(text))) for name, text in asked])

    def _row(self, name: str, score: Callable[[str, np.ndarray], np.ndarray]) -> None:
        values = self._each(score, self.collection.test)
        self._ndcgs[name] = values
        row: dict[str, Any] = {"ndcg": interval(values)}
        row["above BM25"] = difference_interval(values, self._ndcgs[LEXICAL])
        teacher = self._ndcgs.get(name.replace(EMBEDDING, TEXT))
        if name.startswith(EMBEDDING) and teacher is not None:
            row["of teacher"] = ratio_interval(values, teacher)
        row["validation"] = float(np.mean(self._each(score, self.collection.validation)))
        self.found["rows"][name] = row
        self._save(self.found)
