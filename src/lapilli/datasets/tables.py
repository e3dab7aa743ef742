"""Tables: columns by name, of RecBole's atomic files, of Parquet, and of a folder of either.

    user_id:token  item_id:token  rating:float  genre:token_seq      RecBole: name and kind, by tabs
    196            242            3             Comedy Drama

A column of texts is a list of str, one of numbers is float64 [n], one of lists a list of tuples.
pyarrow (the extra "data") is imported when a Parquet file is opened.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lapilli.config.reader import given_path, shown
from lapilli.errors import DataError

Column = np.ndarray | list[str] | list[tuple[str, ...]] | list[tuple[float, ...]]

KINDS: Final = ("token", "token_seq", "float", "float_seq")
"""Kinds of columns in RecBole's atomic files."""
_ATOMIC: Final = (".inter", ".item", ".user")


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of one length.

    Attributes:
        name: of the file, for messages.
        columns: by name, in the order of the file.
    """

    name: str
    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def texts(self, name: str) -> list[str]:
        """Return a column as texts; whole numbers are written without a point.

        Raises:
            DataError: there is no such column, or it holds lists.
        """
        column = self._column(name)
        if isinstance(column, np.ndarray):
            return [str(int(x)) if float(x).is_integer() else str(x) for x in column]
        if column and isinstance(column[0], tuple):
            raise DataError(f"{self.name}: column {name!r} holds lists: expected one text a row")
        return [str(value) for value in column]

    def numbers(self, name: str) -> np.ndarray:
        """Return a column as float64 [n].

        Raises:
            DataError: there is no such column, or it holds something else than finite numbers.
        """
        column = self._column(name)
        try:
            found = np.asarray(column, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.name}: column {name!r} is no column of numbers") from error
        wrong = np.flatnonzero(~np.isfinite(found)) if found.ndim == 1 else np.zeros(1, np.int64)
        if len(wrong):
            raise DataError(
                f"{self.name}: row {int(wrong[0]) + 1} of column {name!r} is no finite number"
            )
        return found

    def lists(self, name: str) -> list[tuple[str, ...]]:
        """Return a column as lists of texts; a text counts as the list of its words.

        Raises:
            DataError: there is no such column.
        """
        column = self._column(name)
        if isinstance(column, np.ndarray):
            return [(text,) for text in self.texts(name)]
        return [
            tuple(map(str, value)) if isinstance(value, tuple) else tuple(value.split())
            for value in column
        ]

    def _column(self, name: str) -> Column:
        if name not in self.columns:
            raise DataError(
                f"{self.name} has no column {shown(name)}: its columns are "
                f"{', '.join(self.columns)}"
            )
        return self.columns[name]


def read_table(path: str | Path) -> Table:
    """Read one file: RecBole's by their endings, else Parquet; a folder of Parquet is one table.

    Raises:
        DataError: no such file, another ending, or one that cannot be read.
    """
    path = given_path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix in _ATOMIC:
        return read_atomic(path)
    if path.suffix == ".parquet":
        return read_parquet(path)
    raise DataError(
        f"{path}: expected a file that ends in {', '.join(_ATOMIC)} or .parquet, or a folder"
    )


def read_atomic(path: Path) -> Table:
    """Read one of RecBole's atomic files.

    Raises:
        DataError: a heading without a known kind, a row of another length, or no number where the
            heading promises one; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 (byte {error.start})") from error
    if not lines:
        raise DataError(f"{path} is empty: expected a heading like user_id:token")
    heads = [_heading(path, head) for head in lines[0].split("\t")]
    names = [name for name, _ in heads]
    if len(set(names)) != len(names):
        raise DataError(f"{path}: the heading has a column twice: {', '.join(names)}")
    rows: list[list[str]] = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(heads):
            raise DataError(
                f"{path}:{number} has {len(fields)} fields, and the heading {len(heads)}: columns "
                "are parted by tabs"
            )
        rows.append(fields)
    values = zip(*rows, strict=True) if rows else [() for _ in heads]
    return Table(
        path.name,
        {
            name: _parsed(path, name, kind, column)
            for (name, kind), column in zip(heads, values, strict=True)
        },
    )


def _heading(path: Path, head: str) -> tuple[str, str]:
    name, mark, kind = head.partition(":")
    if not mark or kind not in KINDS:
        raise DataError(
            f"{path}: the heading {shown(head)} is not name:kind with a kind of {', '.join(KINDS)}"
        )
    return name, kind


def _parsed(path: Path, name: str, kind: str, column: Sequence[str]) -> Column:
    if kind == "token":
        return list(column)
    if kind == "token_seq":
        return [tuple(value.split()) for value in column]
    try:
        if kind == "float":
            return np.array([float(value) for value in column], dtype=np.float64)
        return [tuple(float(number) for number in value.split()) for value in column]
    except ValueError:
        number = next(i for i, value in enumerate(column, start=2) if not _is_float(value, kind))
        raise DataError(
            f"{path}:{number}: column {name!r} is {kind}, found {shown(column[number - 2])}"
        ) from None


def _is_float(value: str, kind: str) -> bool:
    try:
        return bool([float(part) for part in ([value] if kind == "float" else value.split())] or 1)
    except ValueError:
        return False


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file as pyarrow's ParquetFile.

    Raises:
        DataError: pyarrow is missing, or cannot read the file.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet is read by pyarrow: pip install 'lapilli[data]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error!s:.200}") from error


def read_parquet(path: Path) -> Table:
    """Read a Parquet file.

    Raises:
        DataError: see `open_parquet`, or an empty field.
    """
    with open_parquet(path) as file:
        found = file.read()
    columns: dict[str, Column] = {}
    for name in found.column_names:
        values = found.column(name).to_pylist()
        empty = next((i for i, value in enumerate(values, start=1) if value is None), None)
        if empty is not None:
            raise DataError(f"{path}: row {empty} of column {name!r} is empty")
        columns[name] = _from_python(values)
    return Table(path.name, columns)


def _from_python(values: list[object]) -> Column:
    if values and all(isinstance(value, int | float) for value in values):
        return np.asarray(values, dtype=np.float64)
    if values and isinstance(values[0], list):
        return [tuple(map(str, value)) for value in values]  # type: ignore[call-overload]  # lists
    return [str(value) for value in values]


def _read_folder(folder: Path) -> Table:
    """Read a folder of Parquet files with the same columns, as Hugging Face's data sets have."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{folder} has no Parquet file in it")
    parts = [read_parquet(file) for file in files]
    names = list(parts[0].columns)
    for file, part in zip(files, parts, strict=True):
        if list(part.columns) != names:
            raise DataError(
                f"{file} has the columns {', '.join(part.columns)}, and {files[0]} "
                f"{', '.join(names)}: give the files of one split"
            )
    return Table(
        folder.name, {name: _joined([part.columns[name] for part in parts]) for name in names}
    )


def _joined(columns: list[Column]) -> Column:
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    if len(arrays) == len(columns):
        return np.concatenate(arrays)
    return [value for column in columns for value in column]  # type: ignore[return-value]  # of one kind
