"""Questions of a batch: what a file or a folder asks, line by line.

    JSONL     {"question": "...", "images": ["a.png"], "id": 7}     paths beside the file, any id
              {"messages": [{"role": "user", "content": ...}], "id": 7}     as in prompt/openai.py
    Parquet   columns of the same names; pictures may be bytes
    folder    its pictures, in the order of their names, and one question for all of them

    -> Line (numbered from 1) -> Question: messages, or what is wrong

Every line ends as a question or as its error, whatever it holds.
"""

import codecs
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, cast

from lapilli.config.reader import given_path, shown, unique_keys
from lapilli.errors import DataError, PromptError

if TYPE_CHECKING:
    from lapilli.prompt.message import Message

MOST_BYTES = 1 << 28
"""Most bytes of a line, and of all lines of a pipe or a device, which may have no end."""

PICTURES: Final = frozenset(
    (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""How the names of pictures end in a folder that is asked about."""

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ASKED: Final = ("question", "image", "images", "system")
_NO_PIPE: Final = "'-' is standard input, which no line can have: give a path"
_STORED: Final = ("image", "bytes")  # columns of Parquet whose bytes are a picture


@dataclass(frozen=True)
class Question:
    """A question, and the beginning of its result: an error where there are no messages."""

    head: dict[str, Any]
    messages: "tuple[Message, ...]"


@dataclass(frozen=True)
class Line:
    """A line of the input, numbered from 1; its bytes may be anything.

    Attributes:
        number: from 1.
        content: a JSON object, if all is well.
        table: the Parquet file of which it is a row, whose picture may be there.
    """

    number: int
    content: bytes
    table: Path | None = None

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
            if self.table is not None:
                row |= stored_picture(self.table, self.number - 1)
            messages = _messages(row, folder, modalities)
        except PromptError as error:
            return Question(head | {"asked": self.digest, "error": str(error)}, ())
        except Exception as error:  # noqa: BLE001 - a line holds anything, and has to have a result
            reason = f"cannot be read: {type(error).__name__}: {error}"
            return Question(head | {"asked": self.digest, "error": reason}, ())
        return Question(head | {"asked": self.digest}, messages)


def read_questions(source: Path, question: str | None = None) -> list[Line]:
    """Return the lines of a file of JSON lines, a Parquet file, or a folder of pictures.

    Args:
        source: a name that ends in .parquet is a table, a folder has pictures, all else is JSONL.
        question: what is asked about every picture of a folder.

    Raises:
        PromptError: a folder without a question or without pictures, a question and no folder;
            and see `read_lines`.
        DataError: see `read_table`.
        OSError: it cannot be read.
    """
    if source.is_dir():
        return read_folder(source, question)
    if question is not None:
        raise PromptError(
            f"{source} is no folder of pictures, and has questions of its own: leave --question out"
        )
    return read_table(source) if source.suffix == ".parquet" else read_lines(source)


def read_folder(folder: Path, question: str | None) -> list[Line]:
    """Return a line for every picture below a folder, in the order of the names.

    Raises:
        PromptError: no question, or no picture.
    """
    if question is None or not question.strip():
        raise PromptError(f"{folder} is a folder of pictures: say with --question what to ask")
    names = sorted(
        one.relative_to(folder).as_posix()
        for one in folder.rglob("*")
        if one.suffix.lower() in PICTURES and one.is_file()
    )
    if not names:
        raise PromptError(
            f"{folder} has no picture: expected files that end in {', '.join(sorted(PICTURES))}"
        )
    rows = ({"id": name, "question": question, "image": name} for name in names)
    return [Line(number, json.dumps(row).encode()) for number, row in enumerate(rows, 1)]


def read_table(path: Path) -> list[Line]:
    """Return a line for every row of a Parquet file; bytes of pictures stay where they are.

    Raises:
        DataError: pyarrow is missing, cannot read the file, or there is neither a column
            `question` nor `messages`.
    """
    from lapilli.datasets.tables import open_parquet

    lines: list[Line] = []
    with open_parquet(path) as file:
        schema = file.schema_arrow
        if not {"question", "messages"} & set(schema.names):
            raise DataError(
                f"{path} has the columns {', '.join(schema.names)}: expected one named question, "
                "or messages"
            )
        kept = [name for name in schema.names if name not in _stored_columns(schema)]
        for batch in file.iter_batches(columns=kept):
            for row in batch.to_pylist():
                told = {name: value for name, value in row.items() if value is not None}
                if "path" in told:
                    told.setdefault("image", told.pop("path"))
                content = json.dumps(told, default=str).encode()
                lines.append(Line(len(lines) + 1, content, path))
    return lines


def stored_picture(table: Path, row: int) -> dict[str, Any]:
    """Return the picture of a row, counted from 0, under the key `image`; empty: it has none.

    The pictures of a row group are in memory until another one is read.
    """
    from lapilli.datasets.tables import open_parquet

    with open_parquet(table) as file:
        names = _stored_columns(file.schema_arrow)
        if not names:
            return {}
        group = 0
        while row >= file.metadata.row_group(group).num_rows:
            row -= file.metadata.row_group(group).num_rows
            group += 1
    value = _pictures_of(str(table), group, names[0])[row].as_py()
    if isinstance(value, dict):  # as the library datasets writes pictures
        value = value.get("bytes") or value.get("path")
    return {} if value is None else {"image": value}


@lru_cache(maxsize=1)
def _pictures_of(path: str, group: int, column: str) -> Any:  # noqa: ANN401 - pyarrow has no types
    from lapilli.datasets.tables import open_parquet

    with open_parquet(Path(path)) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _stored_columns(schema: Any) -> list[str]:  # noqa: ANN401 - pyarrow has no types
    """Return the columns whose bytes are pictures."""
    from pyarrow import types

    def has_bytes(kind: Any) -> bool:  # noqa: ANN401
        if types.is_struct(kind):
            return any(kind.field(at).name == "bytes" for at in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return [one for one in _STORED if one in schema.names and has_bytes(schema.field(one).type)]


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

    _check_keys(row, modalities)
    if row.get("messages") is not None:
        return _conversation(row, folder, modalities)
    question, system = row.get("question"), row.get("system")
    if not isinstance(question, str | None):
        raise PromptError(f'"question" must be a text, found {_kind(question)}')
    if question is None or not question.strip():
        raise PromptError('no "question" or "messages", or an empty one')
    if not isinstance(system, str | None):
        raise PromptError(f'"system" must be a text, found {_kind(system)}')
    messages = [] if system is None else [Message.system(system)]
    pictures = [_place(each, folder) for each in _pictures(row)]
    media = {name: row[name] for name in modalities if row.get(name) is not None}
    return (*messages, Message.user(question, *pictures, **media))


def _conversation(
    row: dict[str, Any], folder: Path, modalities: Sequence[str]
) -> "tuple[Message, ...]":
    """Return the messages of a line in OpenAI's form, with the paths of their pictures."""
    from lapilli.prompt.openai import messages_of

    beside = [name for name in (*_ASKED, *modalities) if row.get(name) is not None]
    if beside:
        raise PromptError(
            f'both "messages" and "{beside[0]}": what is asked about stands in the messages'
        )
    return tuple(_placed(message, folder) for message in messages_of(row["messages"], modalities))


def _placed(message: "Message", folder: Path) -> "Message":
    """Return the message with the paths of its pictures from `folder` on."""
    from lapilli.prompt.message import MediaPart, Part

    parts: list[Part] = []
    for part in message.parts:
        if isinstance(part, MediaPart) and part.modality == "image":
            source = cast(str, part.source)
            if source == "-":
                raise PromptError(_NO_PIPE)
            parts.append(replace(part, source=_place(source, folder)))
        else:
            parts.append(part)
    return replace(message, parts=tuple(parts))


def _check_keys(row: dict[str, Any], modalities: Sequence[str]) -> None:
    """Refuse a key that is nearly one that the line does not have; other keys are the owner's.

    A question without the picture that it is about would be answered all the same.

    Raises:
        PromptError: such a key.
    """
    told = {name for name, value in row.items() if value is not None}
    has_picture = not told.isdisjoint(("image", "images", "messages"))
    missing = [
        *([] if told & {"question", "messages"} else ["question", "messages"]),
        *([] if has_picture else ["image", "images"]),
        *([] if told & {"system", "messages"} else ["system"]),
    ]
    for name in sorted(told - {"id", "messages", *_ASKED, *modalities}):
        near = get_close_matches(name.lower(), missing, n=1, cutoff=0.85)
        if near:
            raise PromptError(f'unknown key {shown(name)}: did you mean "{near[0]}"?')


def _pictures(row: dict[str, Any]) -> list[str | bytes]:
    image, images = row.get("image"), row.get("images")
    if image is not None and images is not None:
        raise PromptError('both "image" and "images": give one of them')
    if isinstance(image, bytes):  # of a table; JSON has none
        return [image]
    if image is not None and not isinstance(image, str):
        raise PromptError(f'"image" must be a path, a URL or a data URI, found {_kind(image)}')
    pictures = images if images is not None else [] if image is None else [image]
    if not isinstance(pictures, list) or not all(isinstance(each, str) for each in pictures):
        raise PromptError('"images" must be a list of paths, URLs or data URIs')
    if "-" in pictures:
        raise PromptError(_NO_PIPE)
    return pictures


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "a text")


def _place(picture: str | bytes, folder: Path) -> str | bytes:
    from lapilli.media.fetch import is_path

    if isinstance(picture, bytes):
        return picture
    if not picture:
        raise PromptError("the path of a picture is empty")
    return str(folder / given_path(picture)) if is_path(picture) else picture
