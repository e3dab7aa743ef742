"""Texts by id: rows of a JSONL, CSV, TSV or Parquet file, in the order of the file.

    {"id": "i7", "text": "a red shoe", ...}      items of a store, items and queries of a ranking

A file is read twice: once as a whole, so that a bad line is said before a model is loaded, and then
row by row. Parquet needs pyarrow (the extra "data").
"""

import csv
import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np

from lapilli.config.reader import given_path, shown
from lapilli.datasets.tables import open_parquet
from lapilli.errors import DataError

Id = str | int

_ROWS: Final = 4096
_LONGEST: Final = 32 << 20  # letters of a field of CSV
_SHOWN: Final = 12  # columns that a message names


class TextFile:
    """Ids and texts of a file.

    Ids are handed out as they stand there, texts or whole numbers; 7 and "7" are one id.

    Args:
        path: ends in .jsonl, .csv, .tsv or .parquet.
        id_column: name of the column, or key, of the ids.
        text_column: the same of the texts.

    Raises:
        DataError: no such file, column or kind of file; nothing in it; an id or a text that is
            missing or is none, an id that comes twice. The message names the line.
    """

    def __init__(
        self, path: str | Path, *, id_column: str = "id", text_column: str = "text"
    ) -> None:
        self.path = given_path(path)
        self._columns = (id_column, text_column)
        kinds = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
        if self.path.suffix.lower() not in kinds:
            raise DataError(f"{self.path}: expected a file that ends in {', '.join(kinds)}")
        if not self.path.is_file():
            raise DataError(f"{self.path} is no file: expected rows with an id and a text")
        self._read = kinds[self.path.suffix.lower()]
        self._count = self._check()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Id, str]]:
        try:
            for line, one, text in self._read(self.path, *self._columns):
                yield self._id(line, one), self._text(line, text)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def _id(self, line: int, one: object) -> Id:
        name = shown(self._columns[0])
        if one is None or one == "":
            raise DataError(f"{self.path}:{line} has no {name}: give it an id")
        if isinstance(one, bool) or not isinstance(one, Id):
            raise DataError(
                f"{self.path}:{line}: {name} is {shown(one)}: expected a text or a whole number"
            )
        _check_utf8(one, f"{self.path}:{line}: {name}")
        return one

    def _text(self, line: int, text: object) -> str:
        name = shown(self._columns[1])
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{self.path}:{line}: {name} is {shown(text)}: expected a text")
        _check_utf8(text, f"{self.path}:{line}: {name}")
        return text

    def _check(self) -> int:
        """Read the file once; return how many rows it has."""
        pieces, waiting = [np.empty(0, "<u8")], list[bytes]()
        for one, _ in self:
            waiting.append(_key(one))
            if len(waiting) == _ROWS:  # as numbers they take a tenth of the memory
                pieces.append(np.frombuffer(b"".join(waiting), "<u8"))
                waiting = []
        keys = np.concatenate([*pieces, np.frombuffer(b"".join(waiting), "<u8")])
        distinct, counts = np.unique(keys, return_counts=True)
        if not len(keys):
            raise DataError(f"{self.path} is empty: expected rows with an id and a text")
        if len(distinct) < len(keys):
            twice = distinct[counts.argmax()].tobytes()
            rows = self._read(self.path, *self._columns)
            same = [(line, one) for line, one, _ in rows if _key(one) == twice]
            raise DataError(
                f"{self.path}:{same[1][0]}: id {shown(same[1][1])} comes twice, first in line "
                f"{same[0][0]}: give each row its own"
            )
        return len(keys)


def _key(one: Id) -> bytes:
    """Return 8 bytes that tell ids apart, but for one chance in 2^64 / rows^2."""
    return blake2b(str(one).encode(), digest_size=8).digest()


def _check_utf8(given: Id, where: str) -> None:
    """Refuse half a character, which JSON may hold and nothing else can say."""
    try:
        str(given).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is {shown(given)}, which UTF-8 cannot say") from error


Rows = Iterator[tuple[int, Any, Any]]
"""Line, id and text of every row, not looked at yet."""


def _jsonl(path: Path, id_column: str, text_column: str) -> Rows:
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{line} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{line} is {shown(row)}: expected an object")
            _check_columns(f"{path}:{line}", row, id_column, text_column)
            yield line, row[id_column], row[text_column]


def _csv(path: Path, id_column: str, text_column: str) -> Rows:
    limit, reader = csv.field_size_limit(_LONGEST), None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            _check_columns(str(path), reader.fieldnames or (), id_column, text_column)
            for row in reader:
                if None in row:  # what DictReader calls fields without a name
                    raise DataError(
                        f"{path}:{reader.line_num} has {len(row) - 1 + len(row[None])} fields, and "
                        f"the table has {len(row) - 1} columns: put quotes around a text with "
                        f"{delimiter!r} in it"
                    )
                yield reader.line_num, row[id_column], row[text_column]
    except (csv.Error, UnicodeDecodeError) as error:
        line = f":{reader.line_num}" if reader is not None else ""
        raise DataError(f"{path}{line} is no table in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, id_column: str, text_column: str) -> Rows:
    with open_parquet(path) as file:
        _check_columns(str(path), file.schema_arrow.names, id_column, text_column)
        line = 0
        for batch in file.iter_batches(_ROWS, columns=[id_column, text_column]):
            columns = batch.to_pydict()
            for one, text in zip(columns[id_column], columns[text_column], strict=True):
                line += 1
                yield line, one, text


def _check_columns(where: str, found: Iterable[str], *expected: str) -> None:
    names = list(found)
    for name in expected:
        if name not in names:
            listed = ", ".join(map(shown, names[:_SHOWN])) or "none"
            raise DataError(
                f"{where} has the columns {listed}: expected {shown(name)}; the options --id and "
                "--text name others"
            )
