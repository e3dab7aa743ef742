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
        metadata = self._open().metadata
        self._ends = list(
            accumulate(
                metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
            )
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
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self._path} is no whole Parquet file: {error}") from error

    def __reduce__(self) -> tuple[type, tuple[Path, PictureFolder]]:
        """Another process reads its own row groups."""
        return ParquetSource, (self._path, self._folder)

    def _group(self, group: int) -> Any:  # noqa: ANN401 - a pyarrow.Table
        """A row group, of which the last few are kept."""
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = self._read_group(group)
            for old in list(self._groups)[:-_KEPT_GROUPS]:
                self._groups.pop(old, None)  # another thread may have been quicker
        return found

    def _read_group(self, group: int) -> Any:  # noqa: ANN401 - see _group
        import pyarrow

        try:
            with self._open() as file:
                return file.read_row_group(group)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: row group {group} is damaged: {error}") from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> dict[str, Any]:
        """See Source. What is null in the table is not in the record."""
        group = bisect_right(self._ends, index)
        inside = index - (self._ends[group - 1] if group else 0)
        row = self._group(group).slice(inside, 1).to_pylist()[0]
        return {key: value for key, value in row.items() if value is not None}

    def where(self, index: int) -> str:
        """See Source; rows count from 1, as lines do."""
        return f"{self._path}:{index + 1}"

    def media(self, index: int, name: object) -> object:
        """See Source."""
        return self._folder.find(name)
