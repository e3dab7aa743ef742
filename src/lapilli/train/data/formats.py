"""Record formats: the names under which people's data keep turns, pictures and instructions.

    LLaVA     {"id", "image": name | [names], "conversations": [{"from": "human"|"gpt", "value"}]}
    ShareGPT  {"images": [...], "system": text, "conversations": [{"from", "value"}, ...]}
    OpenAI    {"messages": [{"role", "content": text | [{"type": "text"|"image_url"|"image"}]}]}
    a table's {"image": name | [names], "question", "answer"}, or "caption" and no question

    declared  {"user": ..., "item": ...} beside "image", with <user> and <item> in the turns, or
              {"type": "user", "user": ...} among the parts of a turn; only names that the
              checkpoint declares are read so

Every record is looked at on its own: a file may mix the formats. Keys that nothing reads and that
would change what is learned are refused or noted. What is wrong with a record is a DataError
without its place, which `to_sample` adds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lapilli.config.reader import shown
from lapilli.errors import DataError
from lapilli.prompt.message import Role
from lapilli.train.data.source import decode

Record = Mapping[str, Any]
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
TURN_KEYS = ("conversations", "messages", "conversation")
ANSWER_KEYS = ("answer", "caption")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_KEYS = ("image", "images")
_SOURCE_KEYS = ("image_url", "image", "url", "path", "source", "data", "base64")
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
NOTED = (
    *("tools", "functions", "history", "instruction", "input", "context", "hint", "lecture"),
    *("choices", "options", "chosen", "rejected", "rejected_response", "weight", "objects"),
)
_LISTED = 12  # keys that a message names
_ID_KEYS = ("id", "sample_id", "question_id")


def id_of(record: object, *, where: str) -> str:
    """Return how the record names itself; its place, where it does not."""
    name = _first(record, *_ID_KEYS) if isinstance(record, Mapping) else None
    return where if name is None else name if isinstance(name, str) else shown(name)


def signed_words(record: object, modalities: Sequence[str] = ()) -> int:
    """Return the words of a record as the original counts them, negative without media; never 0.

    `modalities` are the names that the checkpoint declares.

    Placeholders count, and turns that are dropped too. What is no sample counts -1.

    Source: LLaVA train.py, LazySupervisedDataset.modality_lengths.
    """
    if not isinstance(record, Mapping):
        return -1
    try:
        turns = turns_of(record, modalities)
    except DataError:
        return -1
    words = max(count_words(turns), 1)
    shows = listed_media(record) or any(record.get(name) is not None for name in modalities)
    shows = shows or any(
        isinstance(part, Mapping) and part.get("type") not in TEXT_PARTS
        for _, content in turns
        if isinstance(content, list)
        for part in content
    )
    return words if shows else -words


def count_words(turns: Sequence[Turn]) -> int:
    """Return the words of all turns; a picture counts as one."""
    words = 0
    for _, content in turns:
        parts = [content] if isinstance(content, str) else content
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else part
            words += len(text.split()) if isinstance(text, str) else 1
    return words


def listed_media(record: Record) -> list[object]:
    """Return what the record's "image" or "images" names, in order."""
    for key in MEDIA_KEYS:
        value = record.get(key)
        if value is not None and value != "":  # made from a table, an empty cell
            return as_list(value)
    return []


def empty_pictures(record: Record) -> tuple[str, ...]:
    """Return what a person should know of a record whose cell for pictures holds none."""
    empty = next((key for key in MEDIA_KEYS if key in record and record[key] in (None, "")), None)
    return () if empty is None else (f"its {empty!r} is empty: it is learned without a picture",)


def as_list(value: object) -> list[object]:
    """Return a list of the value, or the value where it is a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def names_pictures_in_turns(record: Record) -> bool:
    """Return whether parts of its turns say themselves which picture they show."""
    try:
        contents = [content for _, content in turns_of(record) if isinstance(content, list)]
    except DataError:
        return False
    parts = [part for content in contents for part in content if isinstance(part, Mapping)]
    return any(source_of(part) is not None for part in parts)


def source_of(part: Record) -> object:
    """Return what a part says its picture is; None where it leaves that to the record."""
    values = (part.get(key) for key in _SOURCE_KEYS)
    found = (value.get("url", value) if isinstance(value, Mapping) else value for value in values)
    return next((value for value in found if value is not None), None)


def turns_of(record: Record, modalities: Sequence[str] = ()) -> list[Turn]:
    """Return role and content of every turn, under whatever names.

    A table's row shows its media in front, those of declared `modalities` after the pictures.
    """
    key = turns_key(record)
    if key is None:
        return _asked_once(record, modalities)
    turns = record[key]
    if isinstance(turns, str):  # a column of a table may hold JSON
        try:
            turns = decode(turns.encode("utf-8", "surrogatepass"), repr(key))
        except DataError as error:
            raise DataError(f"{key!r} is a text that is no JSON: {error}") from error
    if isinstance(turns, Mapping):
        turns = _rows(turns)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise DataError(f"{key!r} is a {type(turns).__name__}: expected a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(turns)]


def turns_key(record: Record) -> str | None:
    """Return the key of the list of turns; None for a row of a table."""
    return next((key for key in TURN_KEYS if record.get(key) is not None), None)


def _rows(columns: Mapping[str, Any]) -> object:
    """Return the turns of {"from": [...], "value": [...]}, as older tables store them.

    What is no such thing comes back as it is.
    """
    lists = list(columns.values())
    if not lists or not all(isinstance(column, list) for column in lists):
        return columns
    if len({len(column) for column in lists}) > 1:
        lengths = ", ".join(f"{shown(n)}: {len(c)}" for n, c in list(columns.items())[:_LISTED])
        raise DataError(f"the columns of its turns have different lengths ({lengths})")
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _asked_once(record: Record, modalities: Sequence[str]) -> list[Turn]:
    """Return the turns of a row of a table: its pictures and question, its answer or caption."""
    key = next((key for key in ANSWER_KEYS if record.get(key) is not None), None)
    if key is None:
        null = next((key for key in ANSWER_KEYS if key in record), None)
        if null is not None:
            raise DataError(f"its {null!r} is null")
        raise DataError(
            f"no list {' or '.join(map(repr, TURN_KEYS[:2]))} and no text "
            f"{' or '.join(map(repr, ANSWER_KEYS))}, found the keys {_listed(record)}"
        )
    question = "" if record.get("question") is None else _cell(record, "question")
    shown = "" if PLACEHOLDER in question else PLACEHOLDER * len(listed_media(record))
    given = [name for name in modalities if record.get(name) is not None]
    shown += "".join(f"<{name}>" for name in given if f"<{name}>" not in question)
    return [("user", "\n".join(filter(None, (shown, question)))), ("assistant", _cell(record, key))]


def _listed(record: Record) -> str:
    """Return the first keys of a record, for messages."""
    names = ", ".join(map(shown, list(record)[:_LISTED]))
    more = f" and {len(record) - _LISTED} more" if len(record) > _LISTED else ""
    return (names or "none") + more


def _cell(record: Record, key: str) -> str:
    """Return a text, or a number as CSV has it; nan is what pandas writes for an empty cell."""
    value = record[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"its {key!r} is {value}: expected a text")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"its {key!r} is a {type(value).__name__}: expected a text")
    return str(value)


def _turn(turn: object, number: int) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"turn {number} is a {type(turn).__name__}: expected an object")
    speaker = _first(turn, "from", "role")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(
            f"turn {number} is from {shown(speaker)}: expected human, gpt or system (user, "
            "assistant)"
        )
    content = _first(turn, "value", "content")
    if not isinstance(content, str | list):
        raise DataError(
            f"turn {number} says a {type(content).__name__}: expected a text or a list of parts"
        )
    _check_keys_of_turn(turn, number, is_answer=ROLES[speaker] == "assistant")
    return ROLES[speaker], content


def _first(record: Record, *keys: str) -> Any:  # noqa: ANN401 - JSON values
    """Return the first of the keys' values that is not null: a table has all of the keys."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def check_keys(record: Record, *, shows: bool, modalities: Sequence[str] = ()) -> None:
    """Refuse a record that cannot be learned without the keys that nothing reads."""
    if other := first_of(record, tuple(key for key in _OTHER_MEDIA if key not in modalities)):
        raise DataError(f"it has {other!r}, and only images are read: leave it out")
    if (picture := first_of(record, _PICTURES)) and not shows:
        raise DataError(f"it shows no picture, and its {picture!r} is not read: call it 'image'")
    is_table = turns_key(record) is None
    asks = is_table and not record.get("question") and record.get("answer") is not None
    if asks and (question := first_of(record, _QUESTIONS)):
        raise DataError(
            f"it has no 'question', and its {question!r} is not read: call it 'question'"
        )


def _check_keys_of_turn(turn: Record, number: int, *, is_answer: bool) -> None:
    """Refuse a turn that cannot be learned without the keys that nothing reads."""
    if picture := first_of(turn, _PICTURES_OF_A_TURN):
        raise DataError(
            f"turn {number} has a key {picture!r}, which is not read there: list pictures in the "
            "'images' of the record and write <image> where each goes"
        )
    if off := next((key for key in _SWITCHES if is_answer and _is_off(turn.get(key))), None):
        raise DataError(
            f"turn {number} has {off!r} {shown(turn[off])}, and every answer is learned: leave the "
            "turn out"
        )
    if call := first_of(turn, _CALLS):
        raise DataError(f"turn {number} has {call!r}, which is not read: write it into the text")


def _is_off(value: object) -> bool:
    return isinstance(value, bool | int | float) and not value


def first_of(record: Record, keys: tuple[str, ...]) -> str | None:
    """Return the first of the keys that the record has, with a value that is not empty."""
    return next((key for key in keys if record.get(key)), None)
