"""`lapilli batch IN.jsonl OUT.jsonl`: many questions, a line each; may be stopped and run again.

    in    {"question": "...", "images": ["a.png"], "id": 7}      paths beside the file, any id
          {"question": "...", "user": ...}           what the checkpoint declares, by its name
    out   {"line": 1, "id": 7, "asked": "...", "answer": "...", ...} or {..., "error": "..."}

    bytes -> Line (numbered from 1) -> Question: messages, or what is wrong -> Result -> AnswerFile

Every line ends as an answer or as its error, whatever it holds. Answers are written as they come,
each in one piece: whatever ends the program, what is in the file is whole but for a torn last line,
which the next run drops. A line of the input that was changed is answered again; the answer to what
it said before is moved to OUT.old.
"""

import codecs
import errno
import io
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from lapilli.cli.terminal import (
    PLACEHOLDER,
    STAYED_TEXT,
    ChatOptions,
    Sampling,
    StoreOfModality,
    counting,
    note,
    open_stores,
)
from lapilli.config.generation import SamplingParams
from lapilli.config.reader import given_path, unique_keys
from lapilli.errors import LapilliError, PromptError

if TYPE_CHECKING:
    from lapilli.generate.output import Generation
    from lapilli.pipeline import Chat
    from lapilli.prompt.message import Message

Source = Annotated[
    Path, typer.Argument(help="One JSON object per line: question, image or images, id, system.")
]
Retry = Annotated[bool, typer.Option("--retry", help="Ask lines again that ended in an error.")]
Target = Annotated[Path, typer.Argument(help="Answers; lines that it has already are skipped.")]
Folder = Annotated[
    Path | None, typer.Option(help="Where the pictures are; beside the file when left out.")
]
Rows = Annotated[int, typer.Option(min=1, help="Most questions that are answered at once.")]

EXIT_NO_ANSWER = 1
"""Exit code when no line has an answer."""

MOST_BYTES = 1 << 28
"""Most bytes of a line, and of all lines of a pipe or a device, which may have no end."""

Result = dict[str, Any]
"""A line of the output."""

START = b'{"line": '
"""Beginning of every line of the output."""

# Ends of lines to many programs, though not to JSON: written as escapes.
_ESCAPED = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Question:
    """A question, and the beginning of its result: an error where there are no messages."""

    head: dict[str, Any]
    messages: "tuple[Message, ...]"


@dataclass(frozen=True)
class Line:
    """A line of the input, numbered from 1; its bytes may be anything."""

    number: int
    content: bytes

    @cached_property
    def digest(self) -> str:
        """Digest that the output keeps of the line, to see whether it was changed."""
        return blake2b(self.content, digest_size=8).hexdigest()

    def question(self, folder: Path, modalities: Sequence[str] = ()) -> Question:
        """Return what the line asks.

        Relative paths of pictures begin in `folder`; `modalities` are the names that the checkpoint
        declares, whose keys are read.
        """
        head: dict[str, Any] = {"line": self.number}
        try:
            row = _object(self.content)
            if "id" in row:
                head["id"] = _id(row["id"])
            messages = _messages(row, folder, modalities)
        except PromptError as error:
            return Question(head | {"asked": self.digest, "error": str(error)}, ())
        except Exception as error:  # noqa: BLE001 - a line holds anything, and has to have a result
            reason = f"cannot be read: {type(error).__name__}: {error}"
            return Question(head | {"asked": self.digest, "error": reason}, ())
        return Question(head | {"asked": self.digest}, messages)


def read_lines(source: Path) -> list[Line]:
    r"""Return the lines that hold something.

    They end with \n alone: a string in JSON may hold U+2028 and other ends of lines as they are.
    The marks that Windows writes at the beginning of a file are read over, UTF-16 included.

    Raises:
        PromptError: the file is UTF-16 and damaged, or there is more than `MOST_BYTES` in a line,
            or in a pipe or device.
        OSError: it cannot be read.
    """
    with source.open("rb") as opened:
        file: io.BufferedIOBase = opened
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            content = opened.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise PromptError(
                    f"{source} is no regular file and gives more than {MOST_BYTES} bytes: write "
                    "the questions into a file first"
                )
            file = io.BytesIO(content)
        try:
            numbered = enumerate(_contents(file, source), 1)
            return [Line(at, line.strip()) for at, line in numbered if not line.isspace()]
        except UnicodeError as error:
            raise PromptError(f"{source} begins as UTF-16 and is none: {error}") from error


def _contents(file: io.BufferedIOBase, source: Path) -> Iterator[bytes]:
    """Yield the lines in UTF-8.

    Raises:
        PromptError: one has more than `MOST_BYTES`.
    """
    begin = file.read(len(codecs.BOM_UTF8))
    file.seek(0)
    reader: io.BufferedIOBase | io.TextIOWrapper = file
    if begin.startswith(_UTF_16):
        reader = io.TextIOWrapper(cast(IO[bytes], file), "utf-16", newline="\n")
    elif begin == codecs.BOM_UTF8:
        file.seek(len(begin))
    number = 0
    with reader:
        while line := reader.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise PromptError(
                    f"{source}: line {number} has more than {MOST_BYTES} bytes: expected a JSON "
                    "object in each line"
                )
            yield line if isinstance(line, bytes) else line.encode()


def _object(content: bytes) -> dict[str, Any]:
    try:
        row = json.loads(
            content.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=unique_keys
        )
    except UnicodeDecodeError as error:
        raise PromptError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except RecursionError as error:
        raise PromptError("not JSON that can be read: lists or objects too deep") from error
    except ValueError as error:
        raise PromptError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise PromptError("not a JSON object")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _id(value: object) -> object:
    """Return the id, if it can be written as it was read."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:  # 1e999 is read as infinity
        raise PromptError('"id" cannot be written as JSON: use a text or a number') from error
    return value


def _messages(
    row: dict[str, Any], folder: Path, modalities: Sequence[str]
) -> "tuple[Message, ...]":
    from lapilli.prompt.message import Message

    question, system = row.get("question"), row.get("system")
    if not isinstance(question, str | None):
        raise PromptError(f'"question" must be a text, found {_kind(question)}')
    if question is None or not question.strip():
        raise PromptError('no "question", or an empty one')
    if not isinstance(system, str | None):
        raise PromptError(f'"system" must be a text, found {_kind(system)}')
    messages = [] if system is None else [Message.system(system)]
    pictures = (_place(each, folder) for each in _pictures(row))
    media = {name: row[name] for name in modalities if row.get(name) is not None}
    return (*messages, Message.user(question, *pictures, **media))


def _pictures(row: dict[str, Any]) -> list[str]:
    image, images = row.get("image"), row.get("images")
    if image is not None and images is not None:
        raise PromptError('both "image" and "images": give one of them')
    if image is not None and not isinstance(image, str):
        raise PromptError(f'"image" must be a path, a URL or a data URI, found {_kind(image)}')
    pictures = images if images is not None else [] if image is None else [image]
    if not isinstance(pictures, list) or not all(isinstance(each, str) for each in pictures):
        raise PromptError('"images" must be a list of paths, URLs or data URIs')
    if "-" in pictures:
        raise PromptError("'-' is standard input, which no line can have: give a path")
    return pictures


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "a text")


def _place(picture: str, folder: Path) -> str:
    from lapilli.media.fetch import is_path

    if not picture:
        raise PromptError("the path of a picture is empty")
    return str(folder / given_path(picture)) if is_path(picture) else picture


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
    from lapilli.disk import take_lock

    if stat.S_ISREG(os.fstat(number).st_mode) and not take_lock(number):
        raise PromptError(
            f"{path} is being written by another lapilli batch: wait for it, or name another file"
        )


def batch(
    source: Source,
    target: Target,
    images: Folder = None,
    rows: Rows = 16,
    store: StoreOfModality = None,
    retry: Retry = False,
    *,
    how: ChatOptions,
) -> None:
    """Answer the questions of a file, many at a time; run again after a stop, it goes on.

    A line that was changed since is answered again; answers of another model, store or option stay.
    The exit code is 1 where no line has an answer.
    """
    stores = open_stores(store or [])
    lines = read_lines(source)
    with AnswerFile(target, lines, source=source, retry=retry) as answers:
        if not how.quiet:
            _say_what_is_there(answers, len(lines), target)
        waiting = [line for line in lines if line.number not in answers.done]
        folder = images or source.parent
        if waiting and not how.quiet:
            _warn_of_placeholders(waiting, folder)
        if waiting:
            session = how.load(stores, max_rows=rows)
            names = [name for name, _ in session.config.modalities]
            results = answer_lines(session, waiting, folder, how.sampling, names)
            errors = write_results(results, answers, total=len(waiting), quiet=how.quiet)
            if errors and not how.quiet:
                note(f"{errors} of {len(waiting)} lines have an error, see {target}")
        if not answers.num_answers and lines:
            raise typer.Exit(EXIT_NO_ANSWER)


def _say_what_is_there(answers: AnswerFile, num_lines: int, target: Path) -> None:
    if answers.done:
        note(f"{len(answers.done)} of {num_lines} lines are in {target} already")
    if answers.stale:
        note(
            f"{answers.stale} results are errors that are retried, or of lines that were changed "
            f"since: they are now in {answers.old}, and the lines are answered again"
        )


def _warn_of_placeholders(lines: Sequence[Line], folder: Path) -> None:
    """Say in one line where <image> stands in a question beside pictures."""
    for line in lines:
        if PLACEHOLDER.encode() in line.content:
            messages = line.question(folder).messages
            if messages and messages[-1].media and PLACEHOLDER in messages[-1].text:
                note(f"line {line.number}: {STAYED_TEXT}")
                return


def answer_lines(
    session: "Chat",
    lines: Sequence[Line],
    folder: Path,
    sampling: Sampling,
    modalities: Sequence[str] = (),
) -> Iterator[Result]:
    """Yield a result for every line, in the order in which they are finished.

    `modalities` are the names that the checkpoint declares.

    Questions are answered together. Where that ends in an error of all (a fault in the model's
    arithmetic, or in ours), those that were on their way are asked one by one, so that the error
    stays with the line that it belongs to, and the rest goes on together.
    """
    params = SamplingParams.from_options(**sampling)
    questions = [line.question(folder, modalities) for line in lines]
    yield from (question.head for question in questions if not question.messages)
    waiting = [question for question in questions if question.messages]
    while waiting:
        taken: list[Question] = []
        answered: set[int] = set()
        try:
            for at, answer in session.as_completed(_conversations(waiting, taken), params):
                answered.add(at)
                yield taken[at].head | describe(answer)
        except Exception:  # noqa: BLE001 - whatever it was, the lines have to be told apart
            for at, question in enumerate(taken):
                if at not in answered:
                    yield question.head | _answer_alone(session, question.messages, params)
        waiting = waiting[len(taken) :]


def _conversations(
    questions: Sequence[Question], taken: list[Question]
) -> "Iterator[tuple[Message, ...]]":
    """Yield the messages of all questions, and note which are on their way."""
    for question in questions:
        taken.append(question)
        yield question.messages


def _answer_alone(session: "Chat", messages: "Sequence[Message]", params: SamplingParams) -> Result:
    """Return the end of a line's result, whatever happens."""
    try:
        return describe(session.answer(messages, params))
    except LapilliError as error:
        return describe(error)
    except Exception as error:  # noqa: BLE001 - one line must not cost the answers to the others
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def describe(answer: "Generation | LapilliError") -> Result:
    """Return the end of a line's result."""
    if isinstance(answer, LapilliError):
        return {"error": " ".join(str(answer).split())}
    return {
        "answer": answer.text.strip(),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_len,
        "new_tokens": len(answer.token_ids),
    }


def write_results(
    results: Iterator[Result], answers: AnswerFile, *, total: int, quiet: bool
) -> int:
    """Append every result as it comes; return how many are errors."""
    errors = 0
    with counting(quiet=quiet) as show:
        for done, result in enumerate(results, 1):
            answers.add(result)
            errors += "error" in result
            show(done, total)
    return errors
