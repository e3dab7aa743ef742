"""Bytes of one record -> its JSON value, or what is wrong with it; knows no files."""

import json
from typing import Any, Final, NoReturn

from lapilli.config.json_text import MOST_DEPTH, is_deep, unique_keys
from lapilli.errors import DataError

MOST_BYTES: Final = 64 << 20
"""Of one record. Larger pictures in base64 belong into files, or into a Parquet table."""
MOST_VALUES: Final = 1 << 22
"""Of one record: a list of two bytes takes a hundred in memory."""
_SHOWN = 20  # letters of what was found


def decode(data: bytes, where: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    """The value.

    Args:
        data: of one record.
        where: its place, for messages.

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
    if isinstance(data, str):
        return sum(data.count(mark) for mark in ",[{") > MOST_VALUES
    return sum(data.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES


def too_large(where: str) -> DataError:
    """Return the error that says so."""
    return DataError(
        f"{where}: a record of more than {MOST_BYTES >> 20} MiB, or of more than {MOST_VALUES} "
        "values: give pictures as files"
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON: write null, or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_number)
