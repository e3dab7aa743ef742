"""The lines of a batch: bytes of a file -> numbered lines -> questions, or what is wrong."""

import codecs
import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lapilli.errors import PromptError

if TYPE_CHECKING:
    from lapilli.prompt.message import Message

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Question:
    """The beginning of a line's result, and what to ask; the result is an error without that."""

    head: dict[str, Any]
    messages: "tuple[Message, ...]"


@dataclass(frozen=True)
class Line:
    """A line of the input, numbered from 1; its bytes may be anything."""

    number: int
    content: bytes

    @cached_property
    def digest(self) -> str:
        """What the output keeps of the line, to see whether it was changed."""
        return blake2b(self.content, digest_size=8).hexdigest()

    def question(self, folder: Path) -> Question:
        """What the line asks.

        Args:
            folder: where relative paths of pictures begin.
        """
        head: dict[str, Any] = {"line": self.number}
        try:
            row = _object(self.content)
            if "id" in row:
                head["id"] = _id(row["id"])
            messages = _messages(row, folder)
        except PromptError as error:
            return Question(head | {"asked": self.digest, "error": str(error)}, ())
        except Exception as error:  # noqa: BLE001 - a line holds anything, and has to have a result
            reason = f"cannot be read: {type(error).__name__}: {error}"
            return Question(head | {"asked": self.digest, "error": reason}, ())
        return Question(head | {"asked": self.digest}, messages)


def read_lines(source: Path) -> list[Line]:
    r"""The lines that hold something.

    They end with \n alone: a string in JSON may hold U+2028 and other ends of lines as they are.
    The marks that Windows writes at the beginning of a file are read over, UTF-16 included.

    Raises:
        PromptError: the file is UTF-16 and damaged.
        OSError: it cannot be read.
    """
    content = source.read_bytes()
    if content.startswith(_UTF_16):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise PromptError(f"{source} begins as UTF-16 and is none: {error}") from error
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = (Line(number, line.strip()) for number, line in enumerate(content.split(b"\n"), 1))
    return [line for line in lines if line.content]


def _object(content: bytes) -> dict[str, Any]:
    try:
        row = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
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
    """The id, if it can be written as it was read."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:  # 1e999 is read as infinity
        raise PromptError('"id" cannot be written as JSON: use a text or a number') from error
    return value


def _messages(row: dict[str, Any], folder: Path) -> "tuple[Message, ...]":
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
    return (*messages, Message.user(question, *pictures))


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
    return str(folder / picture) if is_path(picture) else picture
