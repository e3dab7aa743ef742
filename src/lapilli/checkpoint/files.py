"""The small JSON and text files of a checkpoint directory, read with errors that name them."""

import json
from pathlib import Path
from typing import Final

from lapilli.config.reader import JsonObject, is_object
from lapilli.errors import CheckpointError, MissingFileError

RESULTS: Final = "model"
"""Where in the folder of a run its results lie."""


def read_json(path: Path) -> JsonObject:
    """A JSON object.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not JSON, or not an object.
    """
    found = read_optional_json(path)
    if found is None:
        results = path.parent / RESULTS
        is_run = any(results.glob("*config.json"))  # an adapter may have adapter_config.json only
        meant = f"did you mean {results}?" if is_run else "is this the directory of a checkpoint?"
        raise MissingFileError(f"{path.name} is missing in {path.parent}: {meant}")
    return found


def read_optional_json(path: Path) -> JsonObject | None:
    """A JSON object, or None when the file is not there.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    text = read_optional_text(path)
    if text is None:
        return None
    try:
        found: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error.msg} in line {error.lineno}"
        ) from error
    if not is_object(found):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_optional_text(path: Path) -> str | None:
    """The text of a file, or None when it is not there.

    Raises:
        CheckpointError: not UTF-8.
    """
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: is it damaged?") from error
