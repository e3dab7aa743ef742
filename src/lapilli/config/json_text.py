"""The one reader of JSON that comes from a stranger: its limits stand here and nowhere else.

What Python's parser takes may still break who uses it: nests that exceed the stack when they are
written again, half characters that cannot be printed, a file larger than the memory.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from lapilli.errors import CheckpointError

MOST_BYTES: Final = 32 << 20
"""Most bytes of a JSON file or header; the largest that are published have a third of it."""
MOST_DEPTH: Final = 100
_UTF_16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")


def parse_json(data: bytes, where: str, *, unique: bool = False) -> object:
    """Return the value of a JSON text.

    Args:
        data: the text in UTF-8; a byte order mark is skipped.
        where: its file, for messages.
        unique: refuse a key that comes twice in an object; else the last one counts.

    Raises:
        CheckpointError: not UTF-8, not JSON, or beyond a limit.
    """
    if len(data) > MOST_BYTES:
        raise CheckpointError(
            f"{where} has {len(data)} bytes of JSON, at most {MOST_BYTES} are read"
        )
    text = decode_text(data, where)
    try:
        found: object = json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where} is not valid JSON: {error.msg} in line {error.lineno}"
        ) from error
    except RecursionError:
        raise CheckpointError(f"{where} is nested more than {MOST_DEPTH} deep") from None
    except ValueError as error:  # a number of thousands of digits, a key that comes twice
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    if is_deep(found):
        raise CheckpointError(f"{where} is nested more than {MOST_DEPTH} deep")
    if "\\ud" in text or "\\uD" in text:
        _refuse_halves(found, where)
    return found


def decode_text(data: bytes, where: str) -> str:
    """Return the text of a file in UTF-8, without a byte order mark.

    Raises:
        CheckpointError: another encoding.
    """
    if data.startswith(_UTF_16):
        raise CheckpointError(f"{where} is UTF-16 text, expected UTF-8: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text: is it damaged?") from error


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, as an object_pairs_hook of the json module.

    Raises:
        ValueError: a key comes twice, so one of its values would be lost.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return made


def is_deep(value: object) -> bool:
    """Return whether lists and objects lie in each other more than MOST_DEPTH deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for holder in level
            for inner in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_halves(value: object, where: str) -> None:
    """Refuse half of a character beyond 16 bits, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{where} holds half a character (a lone surrogate): is it damaged?"
        ) from error
