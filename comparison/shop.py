"""Generated shop, ranked by texts, by vectors of a store, and by what they are compared with.

    fresh -> stage I -> stage II -> vectors -> stage III -> store of the items -> Ranker -> NDCG@10
                 '-> first word          '-> two towers

Items, queries and wordings of the test are drawn apart from those of training.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch

from comparison.baselines import bm25
from comparison.generated import (
    ASKED,
    Item,
    Query,
    candidates,
    description,
    draw_items,
    draw_queries,
    summary,
)
from comparison.intervals import difference_interval, interval, ratio_interval
from comparison.language_model import Sizes, write_language_model
from comparison.rankers import (
    ITEM,
    TEMPLATE,
    Course,
    Record,
    Towers,
    fastest,
    item_flops,
    open_chat,
    taught,
    train_mixed,
    train_reasoning,
    train_text,
    train_towers,
    train_vectors,
)
from lapilli import Chat
from lapilli.config.model import DecoderConfig
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker
from lapilli.rank.metrics import ndcg
from lapilli.rank.mixlm import RankingExample
from lapilli.store import Store
from lapilli.store.encode import TextEncoder, build_store
from lapilli.train.recipe import Phase

PER_QUERY: Final = 8  # examples of a query
_POOL: Final = 150  # items that the candidates of a training query are chosen from

TEACHER, EMBEDDING, TOWERS = "text ranker", "embedding ranker", "bi-encoder"
FIRST_WORD: Final = "text ranker, first word"
MIXED: Final = (Phase(distill=1.0, align=0.0),)
"""Weights of stage III: labels and the text ranker's probabilities."""
LABELS: Final = (Phase(distill=0.0, align=0.0),)
"""Weights behind it, of new examples that the text ranker was not asked about."""
ABLATIONS: Final[Mapping[str, tuple[Phase, ...]]] = {
    "labels and distillation": MIXED,
    "labels alone": LABELS,
    "with self-alignment": (Phase(distill=1.0, align=1.0, text=0.5),),
}
"""Weights of stage III, each for fewer steps than the embedding ranker has."""
WITHOUT_VECTORS: Final = "with an encoder that has not learned alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShopPlan:
    """Sizes of the shop and courses of what is trained for it.

    Attributes:
        fillers: sentences that say nothing in a description; None: items are their summaries.
        taught: examples that the text ranker is asked about, once; the courses `mixed` and
            `towers` go through them several times.
        new: the course of stage III behind `mixed`, in which every example is a new one.
    """

    sizes: Sizes = field(default_factory=lambda: Sizes(layers=2))
    items: int = 8000
    test_items: int = 400
    queries: int = 150
    candidates: int = 40
    fillers: int | None = None
    reasoning: Course = field(default_factory=lambda: Course(steps=600))
    text: Course = field(default_factory=lambda: Course(steps=500, batch=48))
    vectors: Course = field(default_factory=lambda: Course(steps=300, freezes_ranker=True))
    taught: int = 24_000
    mixed: Course = field(default_factory=lambda: Course(steps=2500, batch=48, lr=1e-3))
    new: Course = field(default_factory=lambda: Course(steps=1500, batch=48, lr=1e-3))
    towers: Course = field(default_factory=lambda: Course(steps=3000, batch=48, lr=1e-3))
    words: Course = field(default_factory=lambda: Course(steps=150, batch=48))
    ablation: Course = field(default_factory=lambda: Course(steps=600, batch=48, lr=1e-3))
    seed: int = 0


class Shop:
    """What is learned from and what is ranked, all a function of the plan.

    Args:
        plan: sizes.
        test: number of the draw that is ranked: 0 for choices while the program was made, 1 for
            the figures.
    """

    def __init__(self, plan: ShopPlan, test: int) -> None:
        self.plan, seed = plan, 10 * plan.seed
        self.known = draw_items(plan.items, seed)
        self.items = draw_items(plan.test_items, seed + 1 + test)
        self.queries = draw_queries(plan.queries, self.items, seed + 1 + test)
        self.texts = [self.text(item) for item in self.items]
        seen = {item.values for item in self.known}
        self.overlap = sum(item.values in seen for item in self.items)
        self.wanted = [
            candidates(query, self.items, plan.candidates, seed) for query in self.queries
        ]

    def pairs(self, count: int) -> Iterator[tuple[Query, Item]]:
        """Yield queries and items to learn from, a few items for a query."""
        rng = np.random.default_rng([self.plan.seed, 5])
        for query in draw_queries(-(-count // PER_QUERY), self.known, 10 * self.plan.seed):
            pool = [self.known[i] for i in rng.permutation(len(self.known))[:_POOL]]
            for item in candidates(query, pool, PER_QUERY, self.plan.seed):
                yield query, item

    def examples(self, count: int, text: Callable[[Item, int], str]) -> list[RankingExample]:
        """Return examples with the text of an item, which has a number for its wording."""
        pairs = [pair for pair, _ in zip(self.pairs(count), range(count), strict=False)]
        return [
            RankingExample(query.text, text(item, query.number), query.grade(item) / ASKED)
            for query, item in pairs
        ]

    def text(self, item: Item, wording: int = -1) -> str:
        """Return what is read of an item; a description is worded anew for every training query."""
        if self.plan.fillers is None:
            return summary(item)
        return description(item, fillers=self.plan.fillers, seed=wording + 1)

    def records(self, count: int) -> list[Record]:
        """Return queries and items with a reason: which of the item's values are wanted.

        Items are summaries, which have half of what is wanted.
        """
        rng = np.random.default_rng([self.plan.seed, 6])
        queries = draw_queries(count, self.known, 10 * self.plan.seed)
        found: list[Record] = []
        for place, query in enumerate(queries):
            values = list(self.known[int(rng.integers(len(self.known)))].values)
            for name, value in query.wanted:
                values[name] = value if rng.random() < 0.5 else values[name]
            item = Item(place, tuple(values))
            record = [(f"query: {query.text}\nitem:", False)]
            for name, word in enumerate(item.words):
                is_wanted = (name, values[name]) in query.wanted
                record += [(word, False), ("yes" if is_wanted else "no", True)]
            found.append(record)
        return found

    def words(self) -> list[str]:
        """Return texts with all words there are, for the tokenizer."""
        known = self.known[:300]
        queries = draw_queries(300, known, 10 * self.plan.seed)
        return [
            *(description(item, fillers=4, seed=1) for item in known),
            *(summary(item) for item in known),
            *(TEMPLATE.user.format(query=query.text, item="yes no") for query in queries),
        ]

    def ndcg(self, scores: Callable[[Query, list[Item]], Sequence[float]]) -> np.ndarray:
        """Return NDCG@10 of every query, float [queries]."""
        found = []
        for query, items in zip(self.queries, self.wanted, strict=True):
            grades = [query.grade(item) for item in items]
            found.append(ndcg(grades, np.asarray(scores(query, items)), 10, gain="exponential"))
        return np.array(found)


class ShopComparison:
    """Trains the rankers of a shop and measures them.

    Args:
        plan: sizes and courses.
        folder: where checkpoints and the store go.
        save: called with the result after every part.
        test: which draw is ranked, see Shop.
    """

    def __init__(
        self,
        plan: ShopPlan,
        folder: Path,
        save: Callable[[Mapping[str, Any]], None] = lambda _: None,
        *,
        test: int = 1,
    ) -> None:
        self.plan, self.folder, self._save = plan, folder, save
        self.shop = Shop(plan, test)
        self.found: dict[str, Any] = {"rows": {}, "ablations": {}, "seconds": {}}
        self.found["about"] = {
            "queries": plan.queries,
            "candidates": plan.candidates,
            "steps": plan.ablation.steps,
            "items": plan.test_items,
            "overlap": self.shop.overlap,
            "known": plan.items,
            "taught": plan.taught,
            "new": plan.new.examples,
        }
        self._ndcgs: dict[str, np.ndarray] = {}

    def run(self, *, ablations: bool = False) -> dict[str, Any]:
        """Return rows of quality and cost, ablations if asked for, and seconds of training."""
        self.without_training()
        self.text_rankers()
        self.embedding_ranker()
        self.two_towers()
        self.differences()
        self.speeds()
        if ablations:
            self.ablations()
        return self.found

    def without_training(self) -> None:
        """Measure what needs no training."""
        self._row("random order", self.shop.ndcg(lambda _, items: [0.0] * len(items)))
        score = bm25(self.shop.texts)
        words = {query.number: score(query.text) for query in self.shop.queries}
        self._row(
            "BM25",
            self.shop.ndcg(lambda query, items: [words[query.number][i.number] for i in items]),
        )

    def text_rankers(self) -> None:
        """Train and measure the rankers of texts: whole ones, summaries, and their first word."""
        plan, shop, seconds = self.plan, self.shop, self.found["seconds"]
        write_language_model(self.folder / "fresh", shop.words(), plan.sizes, seed=plan.seed)
        records = shop.records(plan.reasoning.examples)
        seconds["stage I"] = train_reasoning(
            self.folder / "fresh", self.folder / "stage1", records, plan.reasoning
        )
        for name, (text, course) in self._texts().items():
            examples = shop.examples(course.examples, text)
            out = self.folder / _folder(name)
            seconds[name] = train_text(self.folder / "stage1", out, examples, course)
            ranker = Ranker(open_chat(out), template=TEMPLATE)
            self._row(name, shop.ndcg(partial(_text_scores, ranker, text)))

    def embedding_ranker(self) -> None:
        """Train encoder and stage III, store the items of the test, and rank from the store."""
        plan, shop, seconds = self.plan, self.shop, self.found["seconds"]
        fresh, aligned = self.folder / "fresh-encoder", self.folder / "aligned"
        write_language_model(fresh, shop.words(), plan.sizes, matches=False, seed=plan.seed + 1)
        texts = [shop.text(item) for item in shop.known]
        teacher = self.folder / _folder(TEACHER)
        seconds["vectors"] = train_vectors(teacher, fresh, aligned, texts, plan.vectors)
        started = time.process_time()
        examples = self._taught()
        seconds["teacher's answers"] = round(time.process_time() - started, 1)
        mixed, finished = self.folder / "mixed", self.folder / "finished"
        seconds[EMBEDDING] = train_mixed(aligned, mixed, examples, plan.mixed, curriculum=MIXED)
        self._row(f"{EMBEDDING}, {plan.taught:,} examples", self._rank_from_store("mixed"))
        new = shop.examples(plan.taught + plan.new.examples, shop.text)[plan.taught :]
        seconds[f"{EMBEDDING}, new examples"] = train_mixed(
            mixed, finished, new, plan.new, curriculum=LABELS
        )
        self._row(EMBEDDING, self._rank_from_store("finished"))

    def two_towers(self) -> None:
        """Train the bi-encoder on the same examples."""
        plan, shop = self.plan, self.shop
        examples = shop.examples(plan.taught, shop.text)
        towers, self.found["seconds"][TOWERS] = train_towers(
            self.folder / "aligned",
            self.folder / "fresh-encoder",
            self.folder / "towers",
            examples,
            plan.towers,
        )
        self._row(TOWERS, shop.ndcg(_tower_scores(towers, shop)))

    def differences(self) -> None:
        """Compare the embedding ranker with what costs as much, query by query."""
        found = self.found["above"] = {}
        for name in (TOWERS, FIRST_WORD, "BM25"):
            found[name] = difference_interval(self._ndcgs[EMBEDDING], self._ndcgs[name])
        self._save(self.found)

    def ablations(self) -> None:
        """Train stage III shorter, with other parts, and without what the encoder learned alone."""
        examples = self._taught()
        aligned = self.folder / "aligned"
        ways = {name: (aligned, curriculum) for name, curriculum in ABLATIONS.items()}
        ways[WITHOUT_VECTORS] = self.folder / "aligned-start", MIXED
        for number, (name, (start, curriculum)) in enumerate(ways.items()):
            folder = f"ablation{number}"
            course = self.plan.ablation
            train_mixed(start, self.folder / folder, examples, course, curriculum=curriculum)
            self.found["ablations"][name] = self._quality(self._rank_from_store(folder))
            self._save(self.found)

    def speeds(self) -> None:
        """Measure items a second of the rankers, in turns, and count operations and positions."""
        shop = self.shop
        texts = open_chat(self.folder / _folder(TEACHER))
        vectors = self._chat_with_store("finished")
        items = {
            name: [text(item, -1) for item in shop.items]
            for name, (text, _) in self._texts().items()
        }
        prefix, suffix = (len(texts.tokenizer.encode(one)) for one in self._around())
        stored = [MediaPart(str(item.number), ITEM) for item in shop.items]
        ways: dict[str, Callable[[], object]] = {}
        for name, some in items.items():
            ways[name] = partial(_score_anew, texts, shop.queries[0].text, some)
        ways[EMBEDDING] = partial(_score_anew, vectors, shop.queries[0].text, stored)
        config = cast(DecoderConfig, texts.config.text)
        parameters = sum(one.numel() for one in texts.model.parameters())
        self.found["about"]["parameters"] = parameters
        for name, seconds in fastest(ways).items():
            count = 1.0
            if name in items:
                count = float(np.mean([len(texts.tokenizer.encode(one)) for one in items[name]]))
            self.found["rows"][name] |= {
                "positions": count,
                "flops": item_flops(config, prefix, round(count) + suffix),
                "items_per_s": len(stored) / seconds,
            }
        self._save(self.found)

    def _texts(self) -> dict[str, tuple[Callable[[Item, int], str], Course]]:
        """Return by row what a text ranker reads of an item, how it is trained."""
        plan, shop = self.plan, self.shop
        return {
            FIRST_WORD: (lambda item, _: item.words[0], plan.words),
            TEACHER: (shop.text, plan.text),
        }

    def _around(self) -> tuple[str, str]:
        """Return a prompt before its item, and behind it."""
        before, _, behind = TEMPLATE.user.partition("{item}")
        return before.format(query=self.shop.queries[0].text), behind

    def _taught(self) -> list[RankingExample]:
        """Return examples with the text ranker's probabilities."""
        examples = self.shop.examples(self.plan.taught, self.shop.text)
        return taught(self.folder / _folder(TEACHER), examples)

    def _chat_with_store(self, folder: str) -> Chat:
        """Return the ranker of a folder with the test's items in a store on disk."""
        chat, path = open_chat(self.folder / folder), self.folder / f"{folder}-store"
        encoder = TextEncoder(chat.model, chat.tokenizer, modality=ITEM)
        numbers = [str(item.number) for item in self.shop.items]
        build_store(path, zip(numbers, self.shop.texts, strict=True), encoder)
        chat.stores[ITEM] = Store(path)
        return chat

    def _rank_from_store(self, folder: str) -> np.ndarray:
        """Return NDCG@10 of every query."""
        ranker = Ranker(self._chat_with_store(folder), template=TEMPLATE)

        def scores(query: Query, items: list[Item]) -> Sequence[float]:
            stored = [MediaPart(str(item.number), ITEM) for item in items]
            return ranker.score(query.text, stored).tolist()

        return self.shop.ndcg(scores)

    def _row(self, name: str, values: np.ndarray) -> None:
        self._ndcgs[name] = values
        self.found["rows"][name] = self._quality(values)
        self._save(self.found)

    def _quality(self, values: np.ndarray) -> dict[str, Any]:
        found: dict[str, Any] = {"ndcg": interval(values)}
        if TEACHER in self._ndcgs:
            found["of teacher"] = ratio_interval(values, self._ndcgs[TEACHER])
        return found


def _folder(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _score_anew(chat: Chat, query: str, items: Sequence[str | MediaPart]) -> torch.Tensor:
    """Return scores of a ranker that has kept nothing."""
    return Ranker(chat, template=TEMPLATE).score(query, items)


def _text_scores(
    ranker: Ranker, text: Callable[[Item, int], str], query: Query, items: Sequence[Item]
) -> list[float]:
    """Return scores of items by their texts, worded as in the test."""
    return ranker.score(query.text, [text(item, -1) for item in items]).tolist()


def _tower_scores(towers: Towers, shop: Shop) -> Callable[[Query, list[Item]], Sequence[float]]:
    """Return the scores of two towers."""
    with torch.inference_mode():
        vectors = torch.cat([towers.items([text]) for text in shop.texts])
        asked = {query.number: towers.queries([query.text])[0] for query in shop.queries}

    def scores(query: Query, items: list[Item]) -> Sequence[float]:
        return (vectors[[item.number for item in items]] @ asked[query.number]).tolist()

    return scores
