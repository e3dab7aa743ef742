"""Table sources: the rows of CSV as a spreadsheet saves it, and of Parquet, as records.

    image,question,answer        a conversation of one turn
    image,caption                the same with an empty question: what the stage align reads

In CSV fields are parted by commas, semicolons or tabs, whichever the first line has most of, as
spreadsheets take what their language has; rows are kept in memory. Parquet is decoded by row group
and needs pyarrow (the extra "data"), which is imported when a table is opened.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Final

from lapilli.config.reader import shown
from lapilli.errors import ConfigError, DataError
from lapilli.train.data.formats import ANSWER_KEYS, MEDIA_KEYS
from lapilli.train.data.source import (
    LONGEST_NAME,
    MOST_BYTES,
    MOST_VALUES,
    RecordFile,
    listed,
    part_at,
    too_large,
)

_READ: Final = ("id", "image", "question", *ANSWER_KEYS)
_DELIMITERS: Final = ",;\t"
_SHOWN: Final = 12  # columns that a message names
# What a column is called that may be meant to be "image".
_LIKE_IMAGE: Final = ("image", "img", "picture", "photo", "file", "path")


class CsvSource(RecordFile):
    """A CSV file; its first line names the columns, in letters of any case.

    Raises:
        DataError: no column "answer" or "caption", a column of pictures that is not called "image",
            or a file that is no table.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        super().__init__(path, folder)
        self._rows = self._read(path)
        columns = [name.strip().lower() for name in self._rows.pop(0)[1]] if self._rows else []
        self._answer = next((name for name in ANSWER_KEYS if name in columns), "")
        if not self._answer:
            raise DataError(
                f"{path} has the columns {listed(columns, _SHOWN)}: expected image, question "
                "and answer, or image and caption"
            )
        _check_names(path, [name for name in columns if name in _READ])
        other = next((name for name in columns if any(part in name for part in _LIKE_IMAGE)), "")
        if other and "image" not in columns:  # a whole run without its pictures otherwise
            raise DataError(
                f"{path} has the columns {listed(columns, _SHOWN)} and no 'image': rename "
                f"{other[:LONGEST_NAME]} to image, or delete it"
            )
        self._columns = columns

    def _read(self, path: Path) -> list[tuple[int, list[str]]]:
        """Return line and fields of every row that is not empty."""
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
        """See Source; empty cells are left out, but for that of the picture."""
        row = self._row(index)
        said = {"image": row["image"]} if "image" in row else {}
        said |= {"question": row["question"]} if row.get("question") else {}
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


def _check_names(path: Path, columns: Sequence[str]) -> None:
    """Refuse two columns of one name, of which one would be lost."""
    name, count = next(iter(Counter(columns).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(f"{path} has two columns {shown(name)}: rename or delete one")


def _lines_of(path: Path) -> Iterator[str]:
    """Yield lines with their ends, whichever system wrote them; one at a time is in memory.

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
    """Return the error that names the first line which is no UTF-8."""
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
_FEW_ROWS, _ROWS_PER_BYTE = 10_000, 16
_FEW_VALUES = 1_000_000
_FEW_BYTES, _MOST_RATIO = 1 << 20, 100
_MOST_ROWS, _BATCH_BYTES = 1024, 128 << 20
_FEW_UNPACKED, _MOST_GROWTH = 256 << 20, 8


class ParquetSource(RecordFile):
    """A Parquet file. Pictures are paths, bytes, or Hugging Face's {"bytes", "path"}.

    Raises:
        DataError: no Parquet file, a damaged one, or one with two columns of one name.
        ConfigError: pyarrow is not installed.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        super().__init__(path, folder)
        self._groups: dict[int, Any] = {}
        with self._open() as file:
            metadata = file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            rows = [group.num_rows for group in groups]
            self._check_sizes(rows, [group.total_byte_size for group in groups])
            _check_names(path, file.schema_arrow.names)
        self._ends = list(accumulate(rows))

    def _check_sizes(self, rows: list[int], unpacked: list[int]) -> None:
        """Refuse what the bytes of the file cannot hold, or nobody has the memory for.

        Columns are not asked: pyarrow ends the process where what is said of one is damaged.
        """
        size = self._path.stat().st_size
        if min([*rows, *unpacked], default=0) < 0:
            raise DataError(f"{self._path} is damaged: it has row groups of negative sizes")
        if sum(rows) > _FEW_ROWS + _ROWS_PER_BYTE * size:
            raise DataError(
                f"{self._path} has {sum(rows)} rows in {size} bytes: it is damaged, or its rows "
                "are all alike"
            )
        if sum(unpacked) > _FEW_BYTES + _MOST_RATIO * size:
            raise DataError(
                f"{self._path} has {size} bytes that would become {sum(unpacked)}: it is damaged, "
                "or holds nothing to learn"
            )

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

    def __reduce__(self) -> tuple[type, tuple[Path, Path]]:
        """Leave out the row groups: another process reads its own."""
        return ParquetSource, (self._path, self._folder)

    def _group(self, group: int) -> Any:  # noqa: ANN401 - a pyarrow.Table
        """Return a row group, of which the last few are kept."""
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
                table = self._table(file, group)
                table.validate(full=True)  # else what is read of it may lie outside of it
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            said = _short(error)
            raise DataError(f"{self._path}: row group {group} is damaged: {said}") from error
        values, size = sum(map(_num_values, table.columns)), self._path.stat().st_size
        if values > _FEW_VALUES + _ROWS_PER_BYTE * size:
            raise DataError(
                f"{self._path}: row group {group} has {values} values in a file of {size} bytes: "
                "it is damaged, or holds nothing to learn"
            )
        begin = self._ends[group - 1] if group else 0
        if table.num_rows != self._ends[group] - begin:
            raise DataError(
                f"{self._path}: row group {group} is damaged: {table.num_rows} rows, expected "
                f"{self._ends[group] - begin}"
            )
        return table

    def _table(self, file: Any, group: int) -> Any:  # noqa: ANN401 - see _group
        """Read a row group in pieces: one long text may stand in a thousand rows."""
        import pyarrow

        unpacked = file.metadata.row_group(group).total_byte_size
        if any(pyarrow.types.is_dictionary(kind) for kind in file.schema_arrow.types):
            return file.read_row_group(group)  # stays as small as it is stored
        size = min(_MOST_ROWS, max(1, _BATCH_BYTES // max(unpacked, 1)))
        room, batches = _FEW_UNPACKED + _MOST_GROWTH * unpacked, []
        for batch in file.iter_batches(batch_size=size, row_groups=[group]):
            room -= batch.nbytes
            if room < 0:
                raise DataError(
                    f"{self._path}: row group {group} is stored in {unpacked} bytes and becomes "
                    f"more than {_FEW_UNPACKED + _MOST_GROWTH * unpacked}: write smaller groups"
                )
            batches.append(batch)
        return pyarrow.Table.from_batches(batches, schema=file.schema_arrow)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> dict[str, Any]:
        """See Source; what is null in the table is not in the record, but for the pictures."""
        group, inside = part_at(self._ends, index)
        table = self._group(group).slice(inside, 1)
        if sum(map(_num_values, table.columns)) > MOST_VALUES:
            raise too_large(self.where(index))
        try:
            row = table.to_pylist()[0]
        except (ArithmeticError, LookupError, NotImplementedError, ValueError) as error:
            # a date beyond Python's, a text that is no UTF-8, a time zone that nobody has
            raise DataError(
                f"{self.where(index)} has a value that cannot be read: {_short(error)}"
            ) from error
        return {key: one for key, one in row.items() if one is not None or key in MEDIA_KEYS}

    def where(self, index: int) -> str:
        """See Source; rows count from 1, as lines do."""
        return f"{self._path}:{index + 1}"


def _num_values(array: Any) -> int:  # noqa: ANN401 - an array of pyarrow, or one in chunks
    """Return the number of values in an array, those inside of lists and structs included."""
    from pyarrow import types

    kind = array.type
    if types.is_struct(kind):
        return len(array) + sum(map(_num_values, array.flatten()))
    if any(test(kind) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        chunks = getattr(array, "chunks", [array])
        return len(array) + sum(_num_values(chunk.flatten()) for chunk in chunks)
    return len(array)


def _short(error: BaseException) -> str:
    """Return what pyarrow says, which may quote the file, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
