"""Parquet tables as records by row number, decoded by row group.

Needs pyarrow (the extra "data"), which is imported when a table is opened.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from lapilli.errors import ConfigError, DataError
from lapilli.train.data.pictures import PictureFolder

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
