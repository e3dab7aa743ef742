"""`lapilli rank QUERIES ITEMS`: a score for every item after every query, a line each.

    queries   {"id": "q1", "text": "..."}      JSONL, CSV, TSV or Parquet
    items     {"id": "i7", "text": "..."}      the same, or the folder of a store of embeddings
    out       {"query": "q1", "item": "i7", "score": 0.93}, with --top-k the best ones and "rank"

A query's scores are written as they are computed. What is wrong with a file is said, with its line,
before a model is loaded.
"""

import csv
import heapq
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.terminal import Adapter, Base, ChatOptions, Device, Quiet, Template
from lapilli.config.reader import shown
from lapilli.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from lapilli.rank import Head, Labels, Ranker, YesNo
    from lapilli.rank.prompt import Item

Queries = Annotated[Path, typer.Argument(help="JSONL, CSV, TSV or Parquet with id and text.")]
Items = Annotated[
    Path, typer.Argument(help="The same of the items, or the folder of a store of embeddings.")
]
TopK = Annotated[int | None, typer.Option(min=1, help="Write the best ones alone, the best first.")]

LONGEST_FIELD = 32 << 20
"""Letters of a field of CSV."""
VECTORS_AT_ONCE = 256
"""Items that are read from a store at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options of the model."""

    model: Annotated[
        str, typer.Option("--model", "-m", help="A directory, a hub id, or pebble.")
    ] = "pebble"
    base: Base = None
    adapter: Adapter = None
    template: Template = None
    device: Device = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: smaller and faster on a CPU.")
    ] = None
    quiet: Quiet = False

    def of_chat(self) -> ChatOptions:
        """Return them as those of a model that answers."""
        return ChatOptions(
            sampling={}, **{one.name: getattr(self, one.name) for one in fields(self)}
        )


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

    def ranker(self, how: ModelOptions) -> "Ranker":
        """Load the model, and return what scores with it."""
        from lapilli.rank import Ranker, RankTemplate
        from lapilli.rank.prompt import POINTWISE

        score = self.score()
        template = RankTemplate(user=self.prompt or POINTWISE, system=self.system)
        chat = how.of_chat().load()
        return Ranker(chat, score=score, template=template, max_tokens=self.max_tokens)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Catalogue:
    """Items that are scored after each query: ids, and texts or stored vectors.

    Raises:
        PromptError: a file without items, or one that `read_texts` refuses.
        ConfigError: a folder where no store can be read.
    """

    def __init__(self, path: Path) -> None:
        self.ids: Sequence[Any]
        self._texts: list[str] | None = None
        self._store: Any = None
        if path.is_dir():
            self._store = open_store(path)
            self.ids = self._store.ids()
        else:
            rows = read_texts(path)
            self.ids, self._texts = [one for one, _ in rows], [text for _, text in rows]

    def items(self) -> "Iterator[Item]":
        """Yield the items in order; vectors are read as they are needed."""
        if self._texts is not None:
            yield from self._texts
            return
        for start in range(0, len(self.ids), VECTORS_AT_ONCE):
            yield from self._store.get(self.ids[start : start + VECTORS_AT_ONCE]).float()


def open_store(path: Path) -> Any:  # noqa: ANN401 - of a room that this one does not need
    """Return a store of embeddings: `ids()`, and `get(ids) -> [n, T, D]`.

    Raises:
        ConfigError: this lapilli reads no stores.
    """
    try:
        return import_module("lapilli.store").Store.open(path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path} is a folder, and this lapilli reads no stores of embeddings: name a file"
        ) from error


def read_texts(path: Path) -> list[tuple[Any, str]]:
    """Return ids and texts of a file.

    Raises:
        PromptError: another kind of file, nothing in it, or a row without id or text.
        OSError: it cannot be read.
    """
    kinds = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    read = kinds.get(path.suffix.lower())
    if read is None:
        raise PromptError(f"{path}: expected a file that ends in {', '.join(kinds)}")
    found = []
    for line, row in read(path):
        one, text = row.get("id"), row.get("text")
        if isinstance(one, bool) or not isinstance(one, str | int) or one == "":
            raise PromptError(f'{path}:{line}: "id" must be a text or a number, found {shown(one)}')
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f'{path}:{line}: "text" must be a text, found {shown(text)}')
        found.append((one, text))
    if not found:
        raise PromptError(f"{path} is empty: expected rows with id and text")
    return found


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PromptError(f"{path}:{number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise PromptError(f"{path}:{number} is no JSON object with id and text")
            yield number, row


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise PromptError(f"{path} is no table of CSV in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install 'lapilli[data]'") from error
    try:
        table = parquet.ParquetFile(path)
        _check_columns(path, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=["id", "text"]):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except ArrowException as error:
        raise PromptError(f"{path} is no Parquet file: {error}") from error


def _check_columns(path: Path, found: Iterable[str]) -> None:
    names = list(found)
    for name in ("id", "text"):
        if name not in names:
            listed = ", ".join(names) or "none"
            raise PromptError(f"{path} has the columns {listed}: expected {name} among them")


def rank(
    queries: Queries,
    items: Items,
    top_k: TopK = None,
    *,
    what: ScoreOptions,
    how: ModelOptions,
) -> None:
    """Score many items after each query, whose prompt is read once; prints a line per item."""
    asked = read_texts(queries)
    catalogue = Catalogue(items)
    ranker = what.ranker(how)
    for query, text in asked:
        scores = ranker.stream(text, catalogue.items())
        for line in lines_of(query, catalogue.ids, scores, top_k):
            sys.stdout.write(f"{json.dumps(line, ensure_ascii=False)}\n")
            sys.stdout.flush()


def lines_of(
    query: object, ids: Sequence[Any], scores: Iterable[float], top_k: int | None
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
