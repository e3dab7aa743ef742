"""Keys of records that nothing reads: what would change what is learned is refused or noted.

Other trainers and datasets have keys of their own. Most say where a record comes from; some say
what is asked, seen or learned, and a record that is learned without them is another one.
"""

from collections.abc import Mapping
from typing import Any

from lapilli.config.reader import shown

Record = Mapping[str, Any]

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
