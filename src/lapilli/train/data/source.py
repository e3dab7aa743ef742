"""Sources: records of a file by number, and the pictures that they name; knows no conversation.

    paths of a recipe  {00..12}.tar, *            -> files
    JSON, JSON lines   read once: start, end, line of every record (20 bytes each)
                       record(i): seek, read, decode
    pictures           files of a folder, URLs, data URIs, bytes and base64

Only byte ranges stay in memory. Nothing is open between two calls, so a source may be used in
forked processes. Tables and tar archives are sources too: tables.py, tar_source.py.
"""

import base64
import binascii
import codecs
import json
import re
import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from glob import glob
from io import BufferedReader
from itertools import product
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, runtime_checkable

from lapilli.config.reader import MOST_DEPTH, given_path, is_deep, shown, unique_keys
from lapilli.errors import DataError, MediaError
from lapilli.media.fetch import Fetched, fetch

NAME_A_FILE: Final = "name a .json, .jsonl, .csv, .tsv, .parquet or .tar file in it"


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

    def notes(self, index: int, pictures: Sequence[object]) -> tuple[str, ...]:
        """Return what a person should know of record `index`, which shows these pictures.

        Raises:
            DataError: it would be learned without something that belongs to it.
        """


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


LONGEST_NAME = 50
"""Letters of a name in the list of a message."""


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names for a message, long ones cut, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(name[:LONGEST_NAME] for name in names[:most]) or "none") + more


_URL = re.compile(r"(?:https?|data):", re.IGNORECASE)
# How base64 of JPEG, PNG, GIF, WebP, BMP and TIFF begins.
_BASE64 = re.compile(
    r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-9A-Za-z]|SUkq|TU0A)[A-Za-z0-9+/=\s]{60,}"
)
_KEYS = ("bytes", "path", "url")


class RecordFile:
    """A file of records whose pictures are named from a folder; URLs and bytes stay as they are."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.name = str(path)
        self._path, self._folder = path, folder

    def media(self, index: int, name: object) -> object:
        """See Source."""
        picture = picture_of(name)
        return self._folder / str(picture) if is_file_name(picture) else picture

    def notes(self, index: int, pictures: Sequence[object]) -> tuple[str, ...]:
        """See Source; all that belongs to a record stands in it."""
        return ()


def part_at(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Return the part that a number lies in, of parts that end there, and its number inside."""
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def fetch_picture(source: object) -> Fetched:
    """Fetch the picture of a sample.

    Raises:
        MediaError: it cannot be fetched, or is a pipe or a device; for a file that is not there the
            message says where it is looked for.
    """
    if isinstance(source, Path) and _is_special(source):
        raise MediaError(f"{shown(str(source))} is a pipe or a device: expected a picture file")
    try:
        return fetch(source)
    except MediaError as error:
        if isinstance(source, Path) and isinstance(error.__cause__, FileNotFoundError):
            raise MediaError(
                f"{error}: pictures are looked for beside the data file, or in the folder that "
                "images = ... in the recipe, or --images, names"
            ) from error
        raise


def _is_special(path: Path) -> bool:
    """Return whether a name stands for what may never end; a run would wait for it every time."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # fetch says why
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_file_name(picture: object) -> bool:
    """Return whether it is neither bytes nor a URL or data URI."""
    return isinstance(picture, str) and not _URL.match(picture)


def picture_of(name: object) -> str | bytes:
    """Return the bytes that a record holds, or the file name, URL or data URI.

    Raises:
        DataError: neither bytes nor a name.
    """
    if isinstance(name, Mapping):  # a picture column of Hugging Face's datasets
        given = [name[key] for key in _KEYS if name.get(key) is not None]
        if not given:
            keys = ", ".join(map(shown, list(name)[:8])) or "none"
            raise DataError(
                f"a picture is an object without bytes, path and url: its keys are {keys}"
            )
        name = given[0]
    if isinstance(name, bytes | bytearray | memoryview):
        return bytes(name)
    if not isinstance(name, str) or not name.strip():
        found = shown(name) if isinstance(name, str) or name is None else f"a {type(name).__name__}"
        raise DataError(f"a picture is {found}: expected a file name, a URL, a data URI or bytes")
    if not _BASE64.fullmatch(name, 0, min(len(name), 4096)):
        return name
    try:
        return base64.b64decode(name)
    except binascii.Error as error:
        raise DataError(f"a picture in base64 ({name[:12]}...) is damaged: {error}") from error


_CUT = "the file seems to be cut off"
_BLOCK = 1 << 22
_BLANK = " \t\r\n"
_HALF = "unexpected end of data"  # what the decoder says of half a character at the end
_BOM = codecs.BOM_UTF8


class _Ranges(RecordFile):
    """Byte ranges of a file that hold one JSON value each."""

    def __init__(self, path: Path, folder: Path) -> None:
        super().__init__(path, folder)
        self._starts, self._ends = array("q"), array("q")
        self._lines = array("l")

    def _add(self, start: int, end: int, line: int) -> None:
        self._starts.append(start)
        self._ends.append(end)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def record(self, index: int) -> Any:  # noqa: ANN401 - see Source
        """See Source."""
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            data = file.read(self._ends[index] - self._starts[index])
        return decode(data, self.where(index))

    def where(self, index: int) -> str:
        """See Source."""
        return f"{self._path}:{self._lines[index]}"


class LinesSource(_Ranges):
    """A file of one JSON value per line; empty lines do not count.

    A broken line is found when it is read.

    Raises:
        DataError: the file is an array, or a line is longer than MOST_BYTES.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        super().__init__(path, folder)
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MOST_BYTES + 1), b""), 1):
                if len(line) > MOST_BYTES:  # the rest of it may be longer than any disk
                    raise too_large(f"{path}:{number}")
                if line.strip():
                    if not self and line.removeprefix(_BOM).lstrip().startswith(b"["):
                        raise DataError(
                            f"{path} begins with '[': an array belongs into a .json file"
                        )
                    self._add(at, at + len(line), number)
                at += len(line)


class JsonSource(_Ranges):
    """A file of one array of records.

    Raises:
        DataError: the file is no array, or ends in the middle of it.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        super().__init__(path, folder)
        with path.open("rb") as file:
            for start, end, line in _Scanner(path, file).values():
                self._add(start, end, line)


class _Scanner:
    """A scanner of the values of an array; it decodes one at a time and forgets it.

    `text` is the part of the file that is looked at, `at` a place in it.
    """

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._scan = json.JSONDecoder().raw_decode
        self.text, self.at = "", 0
        self._bytes, self._line = 0, 1  # of what lies before `at`
        self._ended = False

    def values(self) -> Iterator[tuple[int, int, int]]:
        """Yield start and end in bytes, and line, of every value.

        Raises:
            DataError: see JsonSource.
        """
        if self._file.read(len(_BOM)) == _BOM:
            self._bytes = len(_BOM)
        else:
            self._file.seek(0)
        if not self._next():
            raise DataError(f"{self._path} is empty: expected a list of samples, '[' ... ']'")
        if self._next() != "[":
            raise DataError(
                f"{self._path}:{self._line}: expected a list of samples, which begins with '[', "
                f"found {self._next()!r}; one object per line belongs into a .jsonl file"
            )
        self._move(self.at + 1)
        if self._next() != "]":
            yield self._value()
            while self._next() == ",":
                self._move(self.at + 1)
                if self._next() == "]":
                    raise DataError(
                        f"{self._path}:{self._line}: a comma before the closing ']': delete it"
                    )
                yield self._value()
        if self._next() != "]":
            raise DataError(
                f"{self._path}:{self._line}: expected ',' or ']' after a sample, found "
                + (repr(self._next()) if self._next() else f"the end of the file: {_CUT}")
            )
        self._move(self.at + 1)
        if self._next():
            raise DataError(f"{self._path}:{self._line}: more text after the list of samples")

    def _next(self) -> str:
        """Return the next character that is no white space; "" at the end of the file."""
        while True:
            end = len(self.text)
            place = self.at
            while place < end and self.text[place] in _BLANK:
                place += 1
            self._move(place)
            if place < end:
                return self.text[place]
            if not self._more():
                return ""

    def _value(self) -> tuple[int, int, int]:
        while True:
            try:
                end = self._scan(self.text, self.at)[1]
            except json.JSONDecodeError as error:
                inside = error.pos - self.at  # a place of the value, wherever that lies in `text`
                if self._may_go_on(error) and self._more():
                    continue
                raise self._no_value(error.msg, inside) from error
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deep nests
                raise DataError(f"{self._path}:{self._line}: no valid JSON: {error}") from error
            start, line = self._bytes, self._line
            self._move(end)
            return start, self._bytes, line

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Return whether more text could mend it: what is wrong is where the text ends."""
        return error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16

    def _no_value(self, reason: str, inside: int) -> DataError:
        place = self.at + inside
        line = self._line + self.text.count("\n", self.at, place)
        is_cut = reason.startswith("Unterminated") or not self.text[place:].strip()
        return DataError(
            f"{self._path}:{line}: no valid JSON: {reason} (in the sample that begins in line "
            f"{self._line})" + f"; {_CUT}" * is_cut
        )

    def _move(self, place: int) -> None:
        passed = self.text[self.at : place]
        self._bytes += len(passed) if passed.isascii() else len(passed.encode())
        self._line += passed.count("\n")
        self.at = place

    def _more(self) -> bool:
        """Read as much again as is kept, and a block at least; False at the end of the file."""
        if self._ended:
            return False
        kept = self.text[self.at :]
        if is_large(kept):
            raise too_large(f"{self._path}:{self._line}")
        data = self._file.read(max(_BLOCK, len(kept)))
        self._ended = not data
        try:
            self.text = kept + self._decode(data, self._ended)
        except UnicodeDecodeError as error:
            line = self._line + kept.count("\n") + error.object[: error.start].count(b"\n")
            advice = _CUT if error.reason == _HALF else "save the file as UTF-8"
            raise DataError(f"{self._path}:{line}: no UTF-8: {error.reason}; {advice}") from error
        self.at = 0
        return not self._ended


MOST_BYTES: Final = 64 << 20
"""Of one record. Larger pictures in base64 belong into files, or into a Parquet table."""
MOST_VALUES: Final = 1 << 22
"""Of one record: a list of two bytes takes a hundred in memory."""
_SHOWN = 20  # letters of what was found


def decode(data: bytes, where: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return the JSON value of a record.

    Raises:
        DataError: no value, more than one, no UTF-8, a key that comes twice in an object (one of
            its values would be lost), NaN and Infinity, which JSON does not have, nests deeper
            than MOST_DEPTH, or more than MOST_BYTES.
    """
    if is_large(data):
        raise too_large(where)
    try:
        found = _DECODER.decode(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        found = error.doc[error.pos : error.pos + _SHOWN].rstrip()
        raise DataError(
            f"{where}: no valid JSON: {error.msg} at character {error.pos + 1}, found "
            f"{repr(found) if found else 'the end'}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON: {error}") from error
    if is_deep(found):
        raise DataError(f"{where}: lists and objects are nested more than {MOST_DEPTH} deep")
    return found


def is_large(data: bytes | str) -> bool:
    """Return whether a record is too long, or has too many values, for the memory of anybody."""
    if len(data) > MOST_BYTES:
        return True
    if len(data) <= MOST_VALUES:
        return False
    if isinstance(data, bytes):
        return sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES
    return sum(data.count(mark) for mark in (",", "[", "{")) > MOST_VALUES


def too_large(where: str) -> DataError:
    """Return the error for a record that `is_large`."""
    return DataError(
        f"{where}: a record of more than {MOST_BYTES >> 20} MiB, or of more than {MOST_VALUES} "
        "values: give pictures as files"
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON: write null, or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_number)
