"""Sources: files of records with random access; knows bytes and offsets, no conversation.

    *.json             one array       an index of byte ranges; a record is read when asked for
    *.jsonl            one per line    the same
    *.csv, *.tsv       one per row     image, question, answer
    *.parquet          row groups      read by pyarrow (the extra "data")
    *.tar              WebDataset      KEY.json, KEY.jpg, ...
    {00..12}.tar, *    several files, one after the other

Nothing is open between two calls, so a source may be used in forked processes.
"""

import codecs
import re
from bisect import bisect_right
from collections.abc import Sequence
from glob import glob
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from lapilli.config.reader import given_path
from lapilli.errors import DataError
from lapilli.train.data.json_source import JsonSource, LinesSource
from lapilli.train.data.pictures import PictureFolder
from lapilli.train.data.tables import CsvSource, ParquetSource
from lapilli.train.data.tar_source import TarSource
from lapilli.train.recipe import SourceRecipe

NAME_A_FILE: Final = "name a .json, .jsonl, .csv, .tsv, .parquet or .tar file in it"

# First bytes of files that are not what their names say, and what to do.
_FOREIGN: Final = (
    (b"\x1f\x8b", "gzip-compressed: unpack it first, samples are read by seeking"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: unpack it first, samples are read by seeking"),
    (b"BZh91AY&SY", "bzip2-compressed: unpack it first, samples are read by seeking"),
    (b"\xfd7zXZ", "xz-compressed: unpack it first, samples are read by seeking"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet: unpack it, or save it as CSV in UTF-8"),
    (codecs.BOM_UTF16_LE, "text in UTF-16: save it in UTF-8"),
    (codecs.BOM_UTF16_BE, "text in UTF-16: save it in UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
)


@runtime_checkable
class Source(Protocol):
    """Records by number."""

    @property
    def name(self) -> str:
        """Return the file, as the recipe names it."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Any:  # noqa: ANN401 - whatever the file holds
        """Return record `index`.

        Raises:
            DataError: it cannot be read; the message names its place.
        """

    def where(self, index: int) -> str:
        """Return the place of a record, "file:line"."""

    def media(self, index: int, name: object) -> object:
        """Return what media/fetch takes for what record `index` calls a picture.

        Raises:
            DataError: there is nothing of that name, or it is no name.
        """


class Joined:
    """Several sources, one after the other."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        self.name = name
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)

    def record(self, index: int) -> Any:  # noqa: ANN401 - see Source
        """See Source."""
        part, inside = self._at(index)
        return part.record(inside)

    def where(self, index: int) -> str:
        """See Source."""
        part, inside = self._at(index)
        return part.where(inside)

    def media(self, index: int, name: object) -> object:
        """See Source."""
        part, inside = self._at(index)
        return part.media(inside, name)


def open_source(recipe: SourceRecipe) -> Source:
    """Open the files of a recipe's source.

    Raises:
        DataError: no such file, a kind that is not known, or one that is damaged.
        ConfigError: a Parquet file without pyarrow.
    """
    parts = [_open_file(path, recipe.images) for path in expand(recipe.path)]
    return parts[0] if len(parts) == 1 else Joined(recipe.path, parts)


def _open_file(path: Path, images: str | None) -> Source:
    folder = _folder_of(path, images)
    try:
        _check_foreign(path)
        return _open_kind(path, folder)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open_kind(path: Path, folder: PictureFolder) -> Source:
    match path.suffix.lower():
        case ".json":
            return JsonSource(path, folder)
        case ".jsonl" | ".ndjson":
            return LinesSource(path, folder)
        case ".csv" | ".tsv":
            return CsvSource(path, folder)
        case ".parquet" | ".pq":
            return ParquetSource(path, folder)
        case ".tar":
            return TarSource(path)
    raise DataError(
        f"{path} is no data file that is known: give .json, .jsonl, .csv, .tsv, .parquet or .tar"
    )


def _folder_of(path: Path, images: str | None) -> PictureFolder:
    folder = path.parent if images is None else given_path(images)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: expected that of the images (from {Path.cwd()})")
    return PictureFolder(folder)


def _check_foreign(path: Path) -> None:
    with path.open("rb") as file:
        begins = file.read(max(len(mark) for mark, _ in _FOREIGN))
    for mark, meaning in _FOREIGN:
        if begins.startswith(mark):
            raise DataError(f"{path} is {meaning}")


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[Path]:
    """Return the files of a path with braces ({a,b}, {000..012}) and wildcards, in order.

    Raises:
        DataError: there is none, or it is a folder.
    """
    whole = given_path(pattern)
    if whole.is_file():
        return [whole]
    pieces = _BRACES.split(str(whole))
    choices = [_choices(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    paths: list[Path] = []
    for parts in product(*choices):
        path = "".join(parts)
        found = sorted(glob(path)) if re.search(r"[*?\[]", path) else [path]  # noqa: PTH207 - of any root
        lost = next((name for name in found or [path] if not Path(name).is_file()), None)
        if lost is not None and Path(lost).is_dir():
            raise DataError(f"{lost} is a folder: {NAME_A_FILE}")
        if lost is not None:
            raise DataError(f"{lost} is no file: expected a data file (from {Path.cwd()})")
        paths += map(Path, found)
    return paths


def _choices(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    return [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
