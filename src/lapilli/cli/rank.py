"""`lapilli rank QUERIES ITEMS`: a score for every item after every query, a line each.

    queries   {"id": "q1", "text": "..."}      JSONL, CSV, TSV or Parquet
    items     {"id": "i7", "text": "..."}      the same, or the folder of a store of embeddings
    out       {"query": "q1", "item": "i7", "score": 0.93}, with --top-k the best ones and "rank"

A query's scores are written as they are computed. What is wrong with a file is said, with its line,
before a model is loaded.
"""

import heapq
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.terminal import IdColumn, ModelOptions, TextColumn
from lapilli.config.reader import shown
from lapilli.errors import ConfigError, LapilliError, StoreError
from lapilli.prompt.message import MediaPart

if TYPE_CHECKING:
    from lapilli.datasets.texts import Id
    from lapilli.rank import Head, Labels, Ranker, YesNo
    from lapilli.rank.prompt import Item
    from lapilli.store import Store

Queries = Annotated[Path, typer.Argument(help="JSONL, CSV, TSV or Parquet with id and text.")]
Items = Annotated[
    Path, typer.Argument(help="The same of the items, or the folder of a store of embeddings.")
]
Modality = Annotated[
    str | None,
    typer.Option(help="A modality of the checkpoint: entries of the store are its media."),
]
TopK = Annotated[int | None, typer.Option(min=1, help="Write the best ones alone, the best first.")]

VECTORS_AT_ONCE = 256
"""Items that are read from a store at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """Options of what is asked and what a score is."""

    prompt: Annotated[
        str | None, typer.Option(help="What is said, with {query} and then {item} in it.")
    ] = None
    system: Annotated[str | None, typer.Option(help="Instructions before it.")] = None
    labels: Annotated[str, typer.Option(help="Labels of one token each, parted by commas.")] = (
        "yes,no"
    )
    values: Annotated[
        str | None,
        typer.Option(help="What each label is worth; left out: the numbers that they are."),
    ] = None
    difference: Annotated[
        bool, typer.Option("--difference", help="Difference of the logits of two labels.")
    ] = False
    head: Annotated[
        Path | None, typer.Option(help="Safetensors with weight [1, D]: in place of labels.")
    ] = None
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Positions of items that are computed at once.")
    ] = 2048

    def score(self) -> "Head | Labels | YesNo":
        """Return the kind of score.

        Raises:
            ConfigError: options that contradict each other, or values that are no numbers.
        """
        from lapilli.rank import Head, Labels, YesNo

        if self.head is not None:
            return Head.load(self.head)
        labels = tuple(label.strip() for label in self.labels.split(","))
        if self.values is None and len(labels) == 2 and not all(map(_is_number, labels)):
            return YesNo(yes=labels[0], no=labels[1], difference=self.difference)
        if self.difference:
            raise ConfigError(f"--difference takes two labels and no values, got {self.labels}")
        if self.values is None:
            return Labels(labels)
        try:
            values = tuple(float(value) for value in self.values.split(","))
        except ValueError as error:
            raise ConfigError(f"--values must be numbers, got {shown(self.values)}") from error
        return Labels(labels, values)

    def ranker(self, how: ModelOptions, stores: "Mapping[str, Store]") -> "Ranker":
        """Load the model, and return what scores with it."""
        from lapilli.rank import Ranker, RankTemplate
        from lapilli.rank.prompt import POINTWISE

        score = self.score()
        template = RankTemplate(user=self.prompt or POINTWISE, system=self.system)
        chat = how.of_chat().load(stores)
        return Ranker(chat, score=score, template=template, max_tokens=self.max_tokens)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Catalogue:
    """Items that are scored after each query: ids, and texts or entries of a store.

    Args:
        path: a file of texts, or the folder of a store.
        modality: by which the entries are read; None: vectors of the language model's width.
        id_column: of a file.
        text_column: of a file.

    Raises:
        DataError: a file that TextFile refuses.
        StoreError: a folder that is no store, or one without entries.
        ConfigError: a modality, and texts.
    """

    def __init__(
        self,
        path: Path,
        *,
        modality: str | None = None,
        id_column: str = "id",
        text_column: str = "text",
    ) -> None:
        self.ids: Sequence[Id]
        self.store: Store | None = None
        self._modality = modality
        self._texts: list[str] = []
        if path.is_dir():
            from lapilli import store as room

            self.store = room.Store.open(path)
            self.ids = self.store.ids()
            if not self.ids:
                raise StoreError(f"{path} has no entries: there is nothing to rank")
            return
        if modality is not None:
            raise ConfigError(f"--modality reads entries of a store, and {path} is none: leave it")
        from lapilli.datasets.texts import TextFile  # imports numpy

        rows = list(TextFile(path, id_column=id_column, text_column=text_column))
        self.ids, self._texts = [one for one, _ in rows], [text for _, text in rows]

    def items(self) -> "Iterator[Item]":
        """Yield the items in order; vectors are read as they are needed."""
        if self.store is None:
            yield from self._texts
        elif self._modality is not None:
            yield from (MediaPart(one, self._modality) for one in self.ids)
        else:
            for start in range(0, len(self.ids), VECTORS_AT_ONCE):
                yield from self.store.get(self.ids[start : start + VECTORS_AT_ONCE])


def rank(
    queries: Queries,
    items: Items,
    top_k: TopK = None,
    *,
    modality: Modality = None,
    id_column: IdColumn = "id",
    text_column: TextColumn = "text",
    what: ScoreOptions,
    how: ModelOptions,
) -> None:
    """Score many items after each query, whose prompt is read once; prints a line per item."""
    from lapilli.datasets.texts import TextFile

    asked = TextFile(queries, id_column=id_column, text_column=text_column)
    catalogue = Catalogue(items, modality=modality, id_column=id_column, text_column=text_column)
    stores = {} if modality is None or catalogue.store is None else {modality: catalogue.store}
    ranker = what.ranker(how, stores)
    for query, text in asked:
        try:
            scores = ranker.stream(text, catalogue.items(), names=catalogue.ids)
            for line in lines_of(query, catalogue.ids, scores, top_k):
                sys.stdout.write(f"{json.dumps(line, ensure_ascii=False)}\n")
                sys.stdout.flush()
        except LapilliError as error:
            raise type(error)(f"query {shown(query)}: {error}") from error


def lines_of(
    query: object, ids: "Sequence[Id]", scores: Iterable[float], top_k: int | None
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a query: as they come, or the best ones; tied items stay in order."""
    pairs = zip(scores, ids, strict=True)
    if top_k is None:
        for score, item in pairs:
            yield {"query": query, "item": item, "score": score}
        return
    best = heapq.nlargest(top_k, pairs, key=lambda pair: pair[0])
    for place, (score, item) in enumerate(best, 1):
        yield {"query": query, "rank": place, "item": item, "score": score}
