"""Records of the formats that people have -> Sample; knows names of keys, opens nothing.

    LLaVA     {"id", "image": name | [names], "conversations": [{"from": "human"|"gpt", "value"}]}
    ShareGPT  {"images": [...], "system": text, "conversations": [{"from", "value"}, ...]}
    OpenAI    {"messages": [{"role", "content": text | [{"type": "text"|"image_url"|"image"}]}]}
    a table's {"image": name | [names], "question", "answer"}, or "caption" and no question

A text of a list of turns holds one "<image>" for every picture that the record lists; in a table
they come first. Every record is looked at on its own: a file may mix the formats. Keys that nothing
reads and that would change what is learned are refused or noted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lapilli.config.reader import shown
from lapilli.errors import DataError, MediaCountMismatchError
from lapilli.prompt.message import MediaPart, Message, Part, Role, TextPart
from lapilli.train.data.json_source import decode
from lapilli.train.data.sample import Sample
from lapilli.train.recipe import Placement

Record = Mapping[str, Any]
Resolve = Callable[[object], object]
Turn = tuple[Role, "str | list[Any]"]

PLACEHOLDER = "<image>"
ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
MOST_LETTERS = 1 << 22
"""Of the turns of a sample: more than any context holds, and what tokenizers have memory for."""
_TURN_KEYS = ("conversations", "messages", "conversation")
ANSWER_KEYS = ("answer", "caption")
_TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_KEYS = ("image", "images")
_SOURCE_KEYS = ("image_url", "image", "url", "path", "source", "data", "base64")
_LISTED = 12  # keys that a message names
_ID_KEYS = ("id", "sample_id", "question_id")


def to_sample(
    record: object, *, where: str, placement: Placement = "front", resolve: Resolve | None = None
) -> Sample:
    """The sample of a record of any known format.

    Args:
        record: what a file holds.
        where: its place, for messages.
        placement: "front" moves the pictures of a turn before its text, as the original does with
            one; "written" leaves them where they stand.
        resolve: makes of what the record calls a picture something that media/fetch takes.

    Raises:
        DataError: no known format, an unknown role, or another number of pictures than of places.

    Source: LLaVA train.py, preprocess_multimodal (placement) and preprocess_v1 (an answer that
        stands first is dropped).
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where} holds a {type(record).__name__}: expected an object")
    sample = Sample(id_of(record, where=where), (), where)
    try:
        turns = turns_of(record)
        words = _count_words(turns)
        turns, notes = _shown_once(turns, record) if placement == "front" else (turns, ())
        messages = _messages(record, turns)
        messages, odd = _from_first_question(messages)
        resolve = resolve or (lambda source: source)
        shown = tuple(_place(_resolved(message, resolve), placement) for message in messages)
    except (_FormatError, DataError) as reason:
        raise DataError(f"{sample.label}: {reason}") from reason
    if not any(message.media for message in shown):
        notes += _empty_pictures(record)
    notes = (*notes, *odd, *notes_on(record))
    return replace(sample, messages=shown, words=words, notes=notes)


def id_of(record: object, *, where: str) -> str:
    """How the record names itself; its place, where it does not."""
    name = _first(record, *_ID_KEYS) if isinstance(record, Mapping) else None
    return where if name is None else name if isinstance(name, str) else shown(name)


class _FormatError(Exception):
    """Why a record is no sample; becomes a DataError with its place."""


def _messages(record: Record, turns: list[Turn]) -> list[Message]:
    one, several = (record.get(key) for key in MEDIA_KEYS)
    if one and several and _as_list(one) != _as_list(several):
        raise _FormatError("its 'image' and its 'images' are not the same: keep one of the keys")
    pictures = _Pictures(listed_media(record))
    messages = [pictures.message(role, content) for role, content in turns]
    if _turns_key(record) is None and PLACEHOLDER not in str(record.get("question") or ""):
        messages = [replace(message, written=None) for message in messages]  # a table's own words
    if pictures.used != len(pictures.names):
        raise _FormatError(
            f"{len(pictures.names)} images but {pictures.used} {PLACEHOLDER} placeholders: write "
            "one for each image"
        )
    letters = sum(len(message.text) for message in messages)
    if letters > MOST_LETTERS:
        raise _FormatError(f"its turns have {letters} letters, at most {MOST_LETTERS} are read")
    for number, message in enumerate(messages):
        if not _is_unicode(message.text):
            raise _FormatError(f"turn {number} has half of a character (a lone surrogate)")
    reason = why_not(
        record,
        is_table=_turns_key(record) is None,
        shows=any(message.media for message in messages),
    )
    if reason is not None:
        raise _FormatError(reason)
    return [*_system(record, messages), *messages]


def _system(record: Record, messages: Sequence[Message]) -> list[Message]:
    """The record's own instructions, which stand in no turn."""
    key, system = system_of(record)
    if not isinstance(system, str):
        raise _FormatError(f"its {key} is a {type(system).__name__}: expected a text")
    if len(system) > MOST_LETTERS:
        raise _FormatError(f"its {key} has {len(system)} letters, at most {MOST_LETTERS} are read")
    if not _is_unicode(system):
        raise _FormatError(f"its {key} has half of a character (a lone surrogate)")
    other = other_system(record)
    if other is not None:
        raise _FormatError(f"its {key!r} and its {other!r} are not the same: keep one of the keys")
    if not system:
        return []
    if messages and messages[0].role == "system":
        if messages[0].text == system:
            return []
        raise _FormatError(f"its {key!r} and its first turn are two systems: keep one of them")
    return [Message.system(system)]


def _from_first_question(messages: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """Turns from the first question on, and what is to be said about it.

    Source: LLaVA train.py, preprocess_v1 and its siblings.
    """
    start = sum(message.role == "system" for message in messages[:1])
    notes: tuple[str, ...] = ()
    if [message.role for message in messages[start : start + 1]] == ["assistant"]:
        if messages[start].media:
            raise _FormatError("the first turn is an answer with an image: only the user shows any")
        messages = messages[:start] + messages[start + 1 :]
        notes = ("the first turn is an answer, which is left out",)
    if len(messages) == start:
        raise _FormatError("it has no turns")
    if len(messages) > start + 1 and messages[-1].role == "user":
        notes = (*notes, "the last turn has no answer")
    return messages, notes


def _is_unicode(text: str) -> bool:
    """JSON can hold what no tokenizer reads: half of a pair that stands for one character."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _shown_once(turns: list[Turn], record: Record) -> tuple[list[Turn], tuple[str, ...]]:
    """One picture that a turn names more than once stands in front of it once, as in the original.

    Source: LLaVA train.py, preprocess_multimodal.
    """
    places = [
        (number, content.count(PLACEHOLDER))
        for number, (_, content) in enumerate(turns)
        if isinstance(content, str) and PLACEHOLDER in content
    ]
    if len(listed_media(record)) != 1 or len(places) != 1 or places[0][1] == 1:
        return turns, ()
    number, count = places[0]
    role, content = turns[number]
    mended = str(content).replace(PLACEHOLDER, "", count - 1)
    note = f"turn {number} has {count} {PLACEHOLDER} for 1 image, which is shown once"
    return [*turns[:number], (role, mended), *turns[number + 1 :]], (note,)


def signed_words(record: object) -> int:
    """Words of a record as the original counts them, negative without pictures; never 0.

    Placeholders count, and turns that are dropped too. What is no sample counts -1.

    Source: LLaVA train.py, LazySupervisedDataset.modality_lengths.
    """
    if not isinstance(record, Mapping):
        return -1
    try:
        turns = turns_of(record)
    except _FormatError:
        return -1
    words = max(_count_words(turns), 1)
    shows = listed_media(record) or any(
        isinstance(part, Mapping) and part.get("type") not in _TEXT_PARTS
        for _, content in turns
        if isinstance(content, list)
        for part in content
    )
    return words if shows else -words


def _count_words(turns: Sequence[Turn]) -> int:
    words = 0
    for _, content in turns:
        parts = [content] if isinstance(content, str) else content
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else part
            words += len(text.split()) if isinstance(text, str) else 1
    return words


def listed_media(record: Record) -> list[object]:
    """What the record's "image" or "images" names, in order."""
    for key in MEDIA_KEYS:
        value = record.get(key)
        if value is not None and value != "":  # made from a table, an empty cell
            return _as_list(value)
    return []


def _empty_pictures(record: Record) -> tuple[str, ...]:
    """What a person should know of a record whose cell for pictures holds none."""
    empty = next((key for key in MEDIA_KEYS if key in record and record[key] in (None, "")), None)
    return () if empty is None else (f"its {empty!r} is empty: it is learned without a picture",)


def _as_list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def names_pictures_in_turns(record: Record) -> bool:
    """Whether parts of its turns say themselves which picture they show."""
    try:
        contents = [content for _, content in turns_of(record) if isinstance(content, list)]
    except _FormatError:
        return False
    parts = [part for content in contents for part in content if isinstance(part, Mapping)]
    return any(_source_of(part) is not None for part in parts)


def _source_of(part: Record) -> object:
    """What a part says its picture is; None where it leaves that to the record."""
    values = (part.get(key) for key in _SOURCE_KEYS)
    found = (value.get("url", value) if isinstance(value, Mapping) else value for value in values)
    return next((value for value in found if value is not None), None)


def turns_of(record: Record) -> list[Turn]:
    """Role and content of every turn, under whatever names."""
    key = _turns_key(record)
    if key is None:
        return _asked_once(record)
    turns = record[key]
    if isinstance(turns, str):  # a column of a table may hold JSON
        try:
            turns = decode(turns.encode("utf-8", "surrogatepass"), repr(key))
        except DataError as error:
            raise _FormatError(f"{key!r} is a text that is no JSON: {error}") from error
    if isinstance(turns, Mapping):
        turns = _rows(turns)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise _FormatError(f"{key!r} is a {type(turns).__name__}: expected a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(turns)]


def _turns_key(record: Record) -> str | None:
    """The key of the list of turns; None: a row of a table."""
    return next((key for key in _TURN_KEYS if record.get(key) is not None), None)


def _rows(columns: Mapping[str, Any]) -> object:
    """The turns of {"from": [...], "value": [...]}, as older tables of Hugging Face store them.

    What is no such thing comes back as it is.
    """
    lists = list(columns.values())
    if not lists or not all(isinstance(column, list) for column in lists):
        return columns
    if len({len(column) for column in lists}) > 1:
        lengths = ", ".join(f"{shown(n)}: {len(c)}" for n, c in list(columns.items())[:_LISTED])
        raise _FormatError(f"the columns of its turns have different lengths ({lengths})")
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _asked_once(record: Record) -> list[Turn]:
    """The turns of a row of a table: its pictures and the question, the answer or caption."""
    key = next((key for key in ANSWER_KEYS if record.get(key) is not None), None)
    if key is None:
        null = next((key for key in ANSWER_KEYS if key in record), None)
        if null is not None:
            raise _FormatError(f"its {null!r} is null")
        raise _FormatError(
            f"no list {' or '.join(map(repr, _TURN_KEYS[:2]))} and no text "
            f"{' or '.join(map(repr, ANSWER_KEYS))}, found the keys "
            f"{_listed(record)}"
        )
    question = "" if record.get("question") is None else _cell(record, "question")
    shown = "" if PLACEHOLDER in question else PLACEHOLDER * len(listed_media(record))
    return [("user", "\n".join(filter(None, (shown, question)))), ("assistant", _cell(record, key))]


def _listed(record: Record) -> str:
    """Keys of a record for messages."""
    names = ", ".join(map(shown, list(record)[:_LISTED]))
    more = f" and {len(record) - _LISTED} more" if len(record) > _LISTED else ""
    return (names or "none") + more


def _cell(record: Record, key: str) -> str:
    """A text, or a number as its text, as in CSV; what pandas writes for an empty cell is none."""
    value = record[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise _FormatError(f"its {key!r} is {value}: expected a text")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _FormatError(f"its {key!r} is a {type(value).__name__}: expected a text")
    return str(value)


def _turn(turn: object, number: int) -> Turn:
    if not isinstance(turn, Mapping):
        raise _FormatError(f"turn {number} is a {type(turn).__name__}: expected an object")
    speaker = _first(turn, "from", "role")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise _FormatError(
            f"turn {number} is from {shown(speaker)}: expected human, gpt or system (user, "
            "assistant)"
        )
    content = _first(turn, "value", "content")
    if not isinstance(content, str | list):
        raise _FormatError(
            f"turn {number} says a {type(content).__name__}: expected a text or a list of parts"
        )
    reason = why_not_turn(turn, is_answer=ROLES[speaker] == "assistant")
    if reason is not None:
        raise _FormatError(f"turn {number} {reason}")
    return ROLES[speaker], content


def _first(record: Record, *keys: str) -> Any:  # noqa: ANN401 - JSON values
    """The first of the keys that says something: a table has all of them, and nulls."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


@dataclass(slots=True)
class _Pictures:
    """The record's pictures, handed out in order."""

    names: list[object]
    used: int = 0

    def message(self, role: Role, content: str | list[Any]) -> Message:
        if isinstance(content, str):
            return self._from_text(role, content)
        parts = [self._part(part) for part in content if part is not None]
        return Message(role, tuple(part for part in parts if part != TextPart("")))

    def _from_text(self, role: Role, text: str) -> Message:
        number = text.count(PLACEHOLDER)
        given = self.names[self.used : self.used + number]
        self.used += number
        try:
            return Message.from_placeholders(role, text, given)
        except MediaCountMismatchError as error:
            raise _FormatError(
                f"{len(self.names)} images but at least {self.used} {PLACEHOLDER} placeholders: "
                "list one image for each"
            ) from error

    def _part(self, part: object) -> Part:
        if isinstance(part, str):
            return TextPart(part)
        if not isinstance(part, Mapping):
            raise _FormatError(f"a part is a {type(part).__name__}: expected an object")
        kind = part.get("type")
        if kind in _TEXT_PARTS:
            return TextPart(str(part.get("text") or ""))
        if kind in ("image", "image_url", "input_image"):
            return MediaPart(self._source(part))
        raise _FormatError(f"a part has the type {shown(kind)}: expected text, image or image_url")

    def _source(self, part: Mapping[str, Any]) -> object:
        own = _source_of(part)
        if own is not None:
            return own
        self.used += 1  # an empty place: the record lists the picture
        if self.used > len(self.names):
            raise _FormatError(
                f"{len(self.names)} images but at least {self.used} parts without a picture of "
                "their own"
            )
        return self.names[self.used - 1]


def _resolved(message: Message, resolve: Resolve) -> Message:
    if not message.media:
        return message
    parts = [
        replace(part, source=resolve(part.source)) if isinstance(part, MediaPart) else part
        for part in message.parts
    ]
    return replace(message, parts=tuple(parts))


def _place(message: Message, placement: Placement) -> Message:
    """Pictures first, and the text without white space around it, as the original.

    The original knows turns with one picture. Several that stand in front already are left as they
    are written, and others are laid as in a question about pictures.
    """
    if placement == "written" or not message.media:
        return message
    text = message.text.strip()
    if message.written is not None:
        if len(message.media) > 1 and not "".join(message.written[:-1]).strip():
            return message
        if len(message.media) == 1 and not text:
            return replace(message, written=("", ""))
    return Message(message.role, (*message.media, *([TextPart(text)] if text else [])))


SYSTEM_KEYS = ("system", "system_prompt", "system_message")
"""What a record calls its instructions; the three mean the same."""
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
# Pictures in data of other trainers: a record of theirs would be learned without any.
_PICTURES = ("img", "img_path", "image_path", "image_file", "image_url", "picture", "photo")
_PICTURES_OF_A_TURN = ("image", "images", *_PICTURES, *_OTHER_MEDIA)
# A table's question under another name: its answer would be learned as a caption.
_QUESTIONS = ("prompt", "query", "instruction", "input", "problem")
# Switches of a single turn, off: its answer would be learned all the same.
_SWITCHES = ("weight", "train", "loss", "learn", "loss_weight")
_CALLS = ("tool_calls", "function_call")
_NOTED = (
    *("tools", "functions", "history", "instruction", "input", "context", "hint", "lecture"),
    *("choices", "options", "chosen", "rejected", "rejected_response", "weight", "objects"),
)


def why_not(record: Record, *, is_table: bool, shows: bool) -> str | None:
    """Why a record cannot be learned without the keys that nothing reads; None: it can.

    Args:
        record: as it is.
        is_table: it has a question and an answer instead of turns.
        shows: it has a picture under a key that is read.
    """
    other = _first_of(record, _OTHER_MEDIA)
    if other is not None:
        return f"it has {other!r}, and only images are read: leave it out"
    picture = _first_of(record, _PICTURES)
    if picture is not None and not shows:
        return f"it shows no picture, and its {picture!r} is not read: call it 'image'"
    asks = is_table and not record.get("question") and record.get("answer") is not None
    question = _first_of(record, _QUESTIONS) if asks else None
    if question is not None:
        return f"it has no 'question', and its {question!r} is not read: call it 'question'"
    return None


def why_not_turn(turn: Record, *, is_answer: bool) -> str | None:
    """The same of one turn, as the end of a sentence about it."""
    picture = _first_of(turn, _PICTURES_OF_A_TURN)
    if picture is not None:
        return (
            f"has a key {picture!r}, which is not read there: list pictures in the 'images' of the "
            "record and write <image> where each goes"
        )
    off = next((key for key in _SWITCHES if is_answer and _is_off(turn.get(key))), None)
    if off is not None:
        return f"has {off!r} {shown(turn[off])}, and every answer is learned: leave the turn out"
    call = _first_of(turn, _CALLS)
    return None if call is None else f"has {call!r}, which is not read: write it into the text"


def notes_on(record: Record) -> tuple[str, ...]:
    """What a person should know of keys that are not read."""
    return tuple(f"its {key!r} is not read" for key in _NOTED if record.get(key))


def system_of(record: Record) -> tuple[str, object]:
    """Key and value of the instructions, an empty text where there are none."""
    key = _first_of(record, SYSTEM_KEYS)
    return ("system", "") if key is None else (key, record[key])


def other_system(record: Record) -> str | None:
    """A second key with other instructions than the first; None: there is none."""
    first = system_of(record)[1]
    return next((k for k in SYSTEM_KEYS if record.get(k) and record[k] != first), None)


def _is_off(value: object) -> bool:
    return isinstance(value, bool | int | float) and not value


def _first_of(record: Record, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if record.get(key)), None)
