"""Bytes of one record -> its JSON value, or what is wrong with it; knows no files."""

import json
from typing import Any, NoReturn

from lapilli.config.json_text import unique_keys
from lapilli.errors import DataError

_SHOWN = 20  # letters of what was found


def decode(data: bytes, where: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    """The value.

    Args:
        data: of one record.
        where: its place, for messages.

    Raises:
        DataError: no value, more than one, no UTF-8, a key that comes twice in an object (one of
            its values would be lost), or NaN and Infinity, which JSON does not have.
    """
    try:
        return _DECODER.decode(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        found = error.doc[error.pos : error.pos + _SHOWN].rstrip()
        raise DataError(
            f"{where}: no valid JSON: {error.msg} at character {error.pos + 1}, found "
            f"{repr(found) if found else 'the end'}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON: {error}") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON: write null, or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_number)
