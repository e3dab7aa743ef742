"""Items: ids and texts of a Parquet, CSV or JSONL file, in the order of the file.

A file is read twice: once as a whole, so that a bad line ends a build before it begins, and then
while it is encoded. Parquet needs pyarrow (the extra "data").
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from lapilli.config.reader import given_path, shown
from lapilli.errors import ConfigError, StoreError
from lapilli.store.index import encode_ids, keys_of

_ROWS: Final = 4096
_LONGEST: Final = 32 << 20  # letters of a field of CSV


class ItemFile:
    """Ids and texts of a file.

    Args:
        path: ends in .parquet, .csv, .tsv or .jsonl.
        id_column: name of the column, or key, of the ids: texts or whole numbers.
        text_column: the same of the texts.

    Raises:
        StoreError: no such file, column or kind of file; an id or text that is missing or no text,
            an id that comes twice. The message names the line.
        ConfigError: pyarrow is not installed.
    """

    def __init__(
        self, path: str | Path, *, id_column: str = "id", text_column: str = "text"
    ) -> None:
        self.path = given_path(path)
        self._columns = (id_column, text_column)
        kinds = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl}
        if self.path.suffix.lower() not in kinds:
            raise StoreError(f"{self.path}: expected a file that ends in {', '.join(kinds)}")
        if not self.path.is_file():
            raise StoreError(f"{self.path} is no file: expected items with an id and a text")
        self._read = kinds[self.path.suffix.lower()]
        self._count = self._check()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for place, one, text in self._read(self.path, *self._columns):
            yield self._id(place, one), self._text(place, text)

    def _id(self, place: int, one: object) -> str:
        if one is None or one == "":
            raise StoreError(f"{self.path}:{place} has no {shown(self._columns[0])}: give it an id")
        try:
            return encode_ids([one])[0].decode()
        except StoreError as error:
            raise StoreError(f"{self.path}:{place}: {error}") from error

    def _text(self, place: int, text: object) -> str:
        if not isinstance(text, str) or not text:
            raise StoreError(
                f"{self.path}:{place}: {shown(self._columns[1])} is {shown(text)}: expected a text"
            )
        return text

    def _check(self) -> int:
        """Read the file once; return how many items it has."""
        pieces, waiting = [np.empty(0, "<u8")], list[bytes]()
        for one, _ in self:
            waiting.append(one.encode())
            if len(waiting) == _ROWS:
                pieces.append(keys_of(waiting))
                waiting = []
        keys, places = np.unique(np.concatenate([*pieces, keys_of(waiting)]), return_counts=True)
        if len(places) and places.max() > 1:
            twice = keys[places.argmax()]
            name = next(one for one, _ in self if keys_of([one.encode()])[0] == twice)
            raise StoreError(f"{self.path}: id {shown(name)} comes twice: give each item its own")
        return int(places.sum())


def _parquet(path: Path, id_column: str, text_column: str) -> Iterator[tuple[int, Any, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: install lapilli[data]") from error
    try:
        with ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, id_column, text_column)
            place = 0
            for batch in file.iter_batches(_ROWS, columns=[id_column, text_column]):
                table = batch.to_pydict()
                for one, text in zip(table[id_column], table[text_column], strict=True):
                    place += 1
                    yield place, one, text
    except (pyarrow.ArrowException, OSError) as error:
        raise StoreError(f"{path} is no whole Parquet file: {error!s:.200}") from error


def _csv(path: Path, id_column: str, text_column: str) -> Iterator[tuple[int, Any, Any]]:
    limit = csv.field_size_limit(_LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            _check_columns(path, reader.fieldnames or [], id_column, text_column)
            for row in reader:
                yield reader.line_num, row[id_column], row[text_column]
    except (csv.Error, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is no table in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _jsonl(path: Path, id_column: str, text_column: str) -> Iterator[tuple[int, Any, Any]]:
    with path.open("rb") as file:
        for place, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise StoreError(f"{path}:{place} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise StoreError(f"{path}:{place} is {shown(record)}: expected an object")
            _check_columns(Path(f"{path}:{place}"), list(record), id_column, text_column)
            yield place, record[id_column], record[text_column]


def _check_columns(path: Path, found: list[str] | Any, *expected: str) -> None:  # noqa: ANN401 - names
    for name in expected:
        if name not in found:
            listed = ", ".join(map(shown, list(found)[:12])) or "none"
            raise StoreError(
                f"{path} has the columns {listed}: expected {shown(name)}; the options --id and "
                "--text name others"
            )
