"""Answers of a batch: a file that may be stopped at any time, and gone on with.

    {"line": 1, "id": 7, "asked": "...", "answer": "...", ...} or {..., "error": "..."}

Answers are written as they come, each in one piece: whatever ends the program, what is in the file
is whole but for a torn last line, which the next run drops. A line of the input that was changed is
answered again; the answer to what it said before is moved to OUT.old.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lapilli.cli.questions import MOST_BYTES, Line
from lapilli.disk import flush_path, take_lock
from lapilli.errors import DataError, PromptError

Result = dict[str, Any]
"""A line of the output."""

START = b'{"line": '
"""Beginning of every line of the output."""

# Ends of lines to many programs, though not to JSON: written as escapes.
_ESCAPED = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


class AnswerFile(AbstractContextManager["AnswerFile"]):
    """The output of a batch: answers that are there, and those that are added; for one process.

    A pipe or a device is written and not read back. `source` is the file of the lines that are to
    be answered.

    Raises:
        PromptError: the file holds something else than answers, another process writes it, it is
            a folder, the input, or a pipe that nobody reads.
        OSError: it cannot be read or written.
    """

    def __init__(
        self, path: Path, lines: Iterable[Line], *, source: Path, retry: bool = False
    ) -> None:
        if path.is_dir():
            raise PromptError(f"{path} is a folder: name a file for the answers")
        self.path = path
        self.old = path.with_name(f"{path.name}.old")
        self.done: frozenset[int] = frozenset()
        """Numbers of the lines that are answered or have their error."""
        self.stale = 0
        """Results that were moved away: the line was changed, or they are errors to be retried."""
        self.num_answers = 0
        """Number of them that are answers."""
        if path.exists() and path.samefile(source):
            raise PromptError(f"{path} is the input: name another file for the answers")
        self._retry = retry
        self._number = _open(path)
        try:
            if stat.S_ISREG(os.fstat(self._number).st_mode):
                self._take_up({line.number: line.digest for line in lines})
        except BaseException:  # an interrupt too must leave no lock behind
            os.close(self._number)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._number)

    def add(self, result: Result) -> None:
        """Append a result, whole.

        Raises:
            OSError: the disk is full, or the like; what was written of the line is a torn end.
        """
        self._write(_encoded(result))
        self.num_answers += "answer" in result

    def sort(self) -> None:
        """Put the results into the order of the lines; a stop in between loses nothing."""
        if stat.S_ISREG(os.fstat(self._number).st_mode):
            rows = sorted(self._rows(), key=lambda row: _read_back(row, self.path)[0])
            self._replace(b"".join(rows))

    def results(self) -> Iterator[Result]:
        """Yield what is there."""
        for row in self._rows():
            yield json.loads(row)

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._number, rest) :]
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def _take_up(self, digests: dict[int, str]) -> None:
        """Read what is there; keep what answers the lines as they are now."""
        kept: dict[int, bytes] = {}
        stale = []
        torn = b""
        for row in self._rows():
            if not row.endswith(b"\n"):
                torn = row
                break
            number, asked, is_answer = _read_back(row, self.path)
            is_usable = is_answer or not self._retry
            is_same = number in digests and asked in (None, digests[number])
            if is_same and is_usable and number not in kept:
                kept[number] = row
                self.num_answers += is_answer
            else:
                stale.append(row)
        self.done, self.stale = frozenset(kept), len(stale)
        if stale:
            with self.old.open("ab") as file:
                file.writelines(stale)
            self._replace(b"".join(kept.values()))
        elif torn:
            os.truncate(self._number, os.fstat(self._number).st_size - len(torn))

    def _rows(self) -> Iterator[bytes]:
        """Yield what is there line by line; the last may be torn.

        Raises:
            PromptError: a line is longer than any answer, or the torn one is none of ours.
        """
        with self.path.open("rb") as file:
            while row := file.readline(MOST_BYTES + 1):
                is_torn = not row.endswith(b"\n")
                if len(row) > MOST_BYTES or (is_torn and not START.startswith(row[: len(START)])):
                    raise _not_ours(self.path)
                yield row

    def _replace(self, content: bytes) -> None:
        """Put another file into the place of this one, so that a stop in between loses nothing."""
        before, whole = self._number, self.path
        self.path = whole.with_name(f"{whole.name}.new")
        self.path.unlink(missing_ok=True)
        self._number = _open(self.path)
        try:
            self._write(content)
            self.path.chmod(stat.S_IMODE(os.fstat(before).st_mode))
            self.path.replace(whole)
        finally:
            self.path = whole
            os.close(before)


def _encoded(result: Result) -> bytes:
    """Return a line of the output; what is no Unicode is written as escapes."""
    try:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False).translate(_ESCAPED)
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(result)}\n".encode()


def _read_back(row: bytes, path: Path) -> tuple[int, str | None, bool]:
    """Return number of the line, what was asked (None: not written), and whether it is an answer.

    A row that was torn and written over is nobody's: line 0.

    Raises:
        PromptError: the row is none of ours.
    """
    try:
        found = json.loads(row)
        number, asked = found["line"], found.get("asked")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if row.startswith(START):
            return 0, None, False
        raise _not_ours(path) from error
    if type(number) is not int or not isinstance(asked, str | None):
        raise _not_ours(path)
    return number, asked, "answer" in found


def _not_ours(path: Path) -> PromptError:
    return PromptError(
        f"{path} holds something else than answers of lapilli batch: name another file"
    )


def _open(path: Path) -> int:
    """Return a descriptor at the end of the file, locked.

    Raises:
        PromptError: another process has it, or nobody reads the pipe that it is.
    """
    while True:
        number = _open_to_append(path)
        try:
            _lock(number, path)
        except BaseException:  # an interrupt too must leave no descriptor open
            os.close(number)
            raise
        # Whoever had it before may have put another file into its place meanwhile.
        if path.exists() and os.path.samestat(os.fstat(number), path.stat()):
            return number
        os.close(number)


def _open_to_append(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    try:  # a pipe without a reader would wait for ever
        number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise PromptError(f"{path} is a pipe that nobody reads: start its reader") from error
        raise
    if sys.platform != "win32":
        os.set_blocking(number, True)
    return number


def _lock(number: int, path: Path) -> None:
    """Make this process the only one that writes the file, where the system can do that."""
    if stat.S_ISREG(os.fstat(number).st_mode) and not take_lock(number):
        raise PromptError(
            f"{path} is being written by another lapilli batch: wait for it, or name another file"
        )


def write_table(answers: AnswerFile, path: Path) -> None:
    """Write the results as a Parquet file, in the order of the lines, in the place of another one.

    Raises:
        DataError: pyarrow is missing.
        OSError: it cannot be written.
    """
    try:
        import pyarrow
        from pyarrow.parquet import write_table as write
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet is written by pyarrow: pip install 'lapilli[data]'"
        ) from error
    rows = sorted(answers.results(), key=lambda row: row["line"])
    kinds = {type(row["id"]) for row in rows if row.get("id") is not None}
    if len(kinds) > 1 or not kinds <= {str, int}:  # a column has one type
        rows = [row | {"id": json.dumps(row["id"])} if "id" in row else row for row in rows]
        kinds = {str}
    texts, counts = ("asked", "answer", "finish_reason", "error"), ("prompt_tokens", "new_tokens")
    schema = pyarrow.schema(
        [
            ("line", pyarrow.int64()),
            ("id", pyarrow.int64() if kinds == {int} else pyarrow.string()),
            *((name, pyarrow.string()) for name in texts),
            *((name, pyarrow.int64()) for name in counts),
        ]
    )
    new = path.with_name(f"{path.name}.new")
    write(pyarrow.Table.from_pylist(rows, schema=schema), new)
    flush_path(new)
    new.replace(path)
