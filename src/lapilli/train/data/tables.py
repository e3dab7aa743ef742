"""A table of pictures and answers, as a spreadsheet saves it: one question about one picture a row.

    image,question,answer        a conversation of one turn
    image,caption                the same with an empty question: what the stage align reads

Fields are parted by commas, semicolons or tabs, whichever the first line has most of: spreadsheets
take what their language has. Rows are kept in memory. Other columns are left alone.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

from lapilli.errors import DataError
from lapilli.train.data.formats import ANSWER_KEYS
from lapilli.train.data.pictures import PictureFolder
from lapilli.train.data.strict_json import MOST_BYTES, too_large

_READ: Final = ("id", "image", "question", *ANSWER_KEYS)
_DELIMITERS: Final = ",;\t"
_SHOWN: Final = 12  # columns that a message names
_SHOWN_LETTERS: Final = 50
# What a column is called that may be meant to be "image".
_LIKE_IMAGE: Final = ("image", "img", "picture", "photo", "file", "path")


class CsvSource:
    """The rows of one file; its first line names the columns, in letters of any case.

    Raises:
        DataError: no column "answer" or "caption", a column of pictures that is not called "image",
            or a file that is no table.
    """

    def __init__(self, path: Path, folder: PictureFolder) -> None:
        self.name = str(path)
        self._folder = folder
        self._rows = self._read(path)
        columns = [name.strip().lower() for name in self._rows.pop(0)[1]] if self._rows else []
        self._answer = next((name for name in ANSWER_KEYS if name in columns), "")
        if not self._answer:
            raise DataError(
                f"{path} has the columns {_listed(columns)}: expected image, question "
                "and answer, or image and caption"
            )
        twice = next((name for name in _READ if columns.count(name) > 1), "")
        if twice:
            raise DataError(f"{path} has two columns {twice!r}: rename or delete one")
        other = next((name for name in columns if any(part in name for part in _LIKE_IMAGE)), "")
        if other and "image" not in columns:  # a whole run without its pictures otherwise
            raise DataError(
                f"{path} has the columns {_listed(columns)} and no 'image': rename "
                f"{other[:_SHOWN_LETTERS]} to image, or delete it"
            )
        self._columns = columns

    def _read(self, path: Path) -> list[tuple[int, list[str]]]:
        """Line and fields of every row; empty lines are none."""
        lines = _lines_of(path)
        first = next(lines, "")
        delimiter = max(_DELIMITERS, key=first.count)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        rows: list[tuple[int, list[str]]] = []
        begin = 1
        limit = csv.field_size_limit(MOST_BYTES)  # a field may hold a picture in base64
        try:
            for fields in reader:
                if fields:
                    rows.append((begin, fields))
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{self.name}:{begin}: no row of a table: {error} (is a quote never closed, or not "
                "doubled inside of a field?)"
            ) from error
        finally:
            csv.field_size_limit(limit)
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> dict[str, Any]:
        """See Source: what the row says, without its empty cells."""
        row = self._row(index)
        said = {name: row[name] for name in ("image", "question") if row.get(name)}
        return {"id": row.get("id") or str(index + 1), **said, self._answer: row[self._answer]}

    def _row(self, index: int) -> Mapping[str, str]:
        fields = self._rows[index][1]
        if len(fields) != len(self._columns):
            raise DataError(
                f"{self.where(index)} has {len(fields)} fields, and the first line "
                f"{len(self._columns)}: put quotes around text with separators or line breaks"
            )
        return dict(zip(self._columns, fields, strict=True))

    def where(self, index: int) -> str:
        """See Source."""
        return f"{self.name}:{self._rows[index][0]}"

    def media(self, index: int, name: object) -> object:
        """See Source."""
        return self._folder.find(name)


def _listed(columns: list[str]) -> str:
    """A few names for messages."""
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return (", ".join(name[:_SHOWN_LETTERS] for name in columns[:_SHOWN]) or "none") + more


def _lines_of(path: Path) -> Iterator[str]:
    """Lines with their ends, whichever system wrote them; a line at a time is in memory.

    Raises:
        DataError: no UTF-8, or a line longer than MOST_BYTES.
    """
    with path.open("rb") as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            for number, line in enumerate(iter(partial(text.readline, MOST_BYTES), ""), 1):
                if len(line) >= MOST_BYTES:
                    raise too_large(f"{path}:{number}")
                yield line
        except UnicodeDecodeError as error:
            raise _no_utf8(path) from error


def _no_utf8(path: Path) -> DataError:
    """The error that names the first line which is no UTF-8."""
    advice = "save the table as CSV in UTF-8"
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MOST_BYTES), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return DataError(f"{path}:{number}: no UTF-8 (byte 0x{byte:02x}): {advice}")
    return DataError(f"{path} is no UTF-8: {advice}")
