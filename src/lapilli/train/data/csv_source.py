"""A table of pictures and answers, as a spreadsheet saves it: one question about one picture a row.

    image,question,answer        a conversation of one turn
    image,caption                the same with an empty question: what the stage align reads

Fields are parted by commas, semicolons or tabs, whichever the first line has most of: spreadsheets
take what their language has. Rows are kept in memory. Other columns are left alone.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lapilli.errors import DataError
from lapilli.train.data.formats import ANSWER_KEYS
from lapilli.train.data.pictures import PictureFolder

_READ: Final = ("id", "image", "question", *ANSWER_KEYS)
_DELIMITERS: Final = ",;\t"
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
        self._rows = self._read(_text_of(path))
        columns = [name.strip().lower() for name in self._rows.pop(0)[1]] if self._rows else []
        self._answer = next((name for name in ANSWER_KEYS if name in columns), "")
        if not self._answer:
            raise DataError(
                f"{path} has the columns {', '.join(columns) or 'none'}: expected image, question "
                "and answer, or image and caption"
            )
        twice = next((name for name in _READ if columns.count(name) > 1), "")
        if twice:
            raise DataError(f"{path} has two columns {twice!r}: rename or delete one")
        other = next((name for name in columns if any(part in name for part in _LIKE_IMAGE)), "")
        if other and "image" not in columns:  # a whole run without its pictures otherwise
            raise DataError(
                f"{path} has the columns {', '.join(columns)} and no 'image': rename {other} to "
                "image, or delete it"
            )
        self._columns = columns

    def _read(self, text: str) -> list[tuple[int, list[str]]]:
        """Line and fields of every row; empty lines are none."""
        first = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows: list[tuple[int, list[str]]] = []
        begin = 1
        limit = csv.field_size_limit(len(text) + 1)  # a field may hold a picture in base64
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


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: no UTF-8 (byte 0x{data[error.start]:02x}): save the table as CSV in "
            "UTF-8"
        ) from error
