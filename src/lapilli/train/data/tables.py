"""Tables as records by row: CSV as a spreadsheet saves it, and Parquet.

    image,question,answer        a conversation of one turn
    image,caption                the same with an empty question: what the stage align reads

In CSV fields are parted by commas, semicolons or tabs, whichever the first line has most of, as
spreadsheets take what their language has; rows are kept in memory. Parquet is decoded by row group
and needs pyarrow (the extra "data"), which is imported when a table is opened.
"""

import csv
import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Final

from lapilli.errors import ConfigError, DataError
from lapilli.train.data.formats import ANSWER_KEYS
from lapilli.train.data.json_source import MOST_BYTES, too_large
from lapilli.train.data.sample import PictureFolder

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


_KEPT_GROUPS = 4
_LONGEST = 300  # letters of a message of pyarrow
_FEW_VALUES, _VALUES_PER_BYTE = 10_000, 16
_FEW_BYTES, _MOST_RATIO = 64 << 20, 100


class ParquetSource:
    """The rows of one file. Pictures are paths, bytes, or Hugging Face's {"bytes", "path"}.

    Raises:
        DataError: no Parquet file, or a damaged one.
        ConfigError: pyarrow is not installed.
    """

    def __init__(self, path: Path, folder: PictureFolder) -> None:
        self.name = str(path)
        self._path, self._folder = path, folder
        self._groups: dict[int, Any] = {}
        with self._open() as file:
            metadata = file.metadata
            groups = range(metadata.num_row_groups)
            rows = [self._checked_rows(metadata.row_group(group), group) for group in groups]
        self._ends = list(accumulate(rows))

    def _checked_rows(self, group: Any, number: int) -> int:  # noqa: ANN401 - see _open
        """Rows of a row group, unless its bytes cannot hold what it says.

        What a few bytes stand for would have no room in memory, and what has as many rows that are
        all alike is no training data.
        """
        columns = [group.column(index) for index in range(group.num_columns)]
        packed = sum(column.total_compressed_size for column in columns)
        unpacked = sum(column.total_uncompressed_size for column in columns)
        values = max((column.num_values for column in columns), default=0)
        most = max(values, group.num_rows)
        sizes = [c.total_compressed_size for c in columns]
        if min([*sizes, group.num_rows, values]) < 0 or packed > self._path.stat().st_size:
            raise DataError(
                f"{self._path}: row group {number} is damaged: its sizes are impossible"
            )
        if most > _FEW_VALUES + _VALUES_PER_BYTE * packed:
            raise DataError(
                f"{self._path}: row group {number} has {most} rows or values in {packed} bytes: "
                "it is damaged, or its rows are all alike"
            )
        if unpacked > _FEW_BYTES + _MOST_RATIO * packed:
            raise DataError(
                f"{self._path}: row group {number} has {packed} bytes that would become "
                f"{unpacked}: it is damaged, or holds nothing to learn"
            )
        return int(group.num_rows)

    def _open(self) -> Any:  # noqa: ANN401 - pyarrow has no types
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ConfigError(
                f"{self._path} needs pyarrow: install lapilli[data], or convert it to JSON lines"
            ) from error
        try:
            return ParquetFile(self._path)
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(f"{self._path} is no whole Parquet file: {_short(error)}") from error

    def __reduce__(self) -> tuple[type, tuple[Path, PictureFolder]]:
        """Another process reads its own row groups."""
        return ParquetSource, (self._path, self._folder)

    def _group(self, group: int) -> Any:  # noqa: ANN401 - a pyarrow.Table
        """A row group, of which the last few are kept."""
        found = self._groups.get(group)
        if found is None:
            try:
                found = self._read_group(group)
            except DataError as error:  # said for every row of it, without another reading
                found = error
            self._groups[group] = found
            for old in list(self._groups)[:-_KEPT_GROUPS]:
                self._groups.pop(old, None)  # another thread may have been quicker
        if isinstance(found, DataError):
            raise DataError(str(found))
        return found

    def _read_group(self, group: int) -> Any:  # noqa: ANN401 - see _group
        import pyarrow

        try:
            with self._open() as file:
                table = file.read_row_group(group)
                table.validate(full=True)  # else what is read of it may lie outside of it
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            said = _short(error)
            raise DataError(f"{self._path}: row group {group} is damaged: {said}") from error
        begin = self._ends[group - 1] if group else 0
        if table.num_rows != self._ends[group] - begin:
            raise DataError(
                f"{self._path}: row group {group} is damaged: {table.num_rows} rows, expected "
                f"{self._ends[group] - begin}"
            )
        return table

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> dict[str, Any]:
        """See Source. What is null in the table is not in the record."""
        group = bisect_right(self._ends, index)
        inside = index - (self._ends[group - 1] if group else 0)
        table = self._group(group)
        try:
            row = table.slice(inside, 1).to_pylist()[0]
        except (ArithmeticError, LookupError, NotImplementedError, ValueError) as error:
            # a date beyond Python's, a text that is no UTF-8, a time zone that nobody has
            raise DataError(
                f"{self.where(index)} has a value that cannot be read: {_short(error)}"
            ) from error
        return {key: value for key, value in row.items() if value is not None}

    def where(self, index: int) -> str:
        """See Source; rows count from 1, as lines do."""
        return f"{self._path}:{index + 1}"

    def media(self, index: int, name: object) -> object:
        """See Source."""
        return self._folder.find(name)


def _short(error: BaseException) -> str:
    """What pyarrow says, which may quote the file, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
