"""Small files of a checkpoint directory, read with errors that name them.

Only regular files are opened: a name may be a directory, a device, a pipe that never ends, or a
link to itself.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lapilli.config.reader import MOST_BYTES, JsonObject, decode_text, is_object, parse_json
from lapilli.errors import CheckpointError, MissingFileError

RESULTS: Final = "model"
"""Folder of the results in the folder of a training run."""
GGUF: Final = (
    "GGUF, the format of llama.cpp, which is not read: take the checkpoint that it was made from, "
    "with config.json and safetensors"
)


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Make what is wrong with the files of a folder name the folder.

    Raises:
        CheckpointError: the one inside, behind the name of the folder if it did not have it.
    """
    try:
        yield
    except CheckpointError as error:
        if str(folder) in str(error):
            raise
        raise type(error)(f"{folder}: {error}") from error


def read_json(path: Path) -> JsonObject:
    """Read a JSON object.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not JSON, or not an object.
    """
    found = read_optional_json(path)
    if found is None:
        raise MissingFileError(f"{path.name} is missing in {path.parent}: {_advice(path.parent)}")
    return found


def _advice(directory: Path) -> str:
    """Return advice about a directory that lacks a needed file."""
    results = directory / RESULTS
    if any(results.glob("*config.json")):  # an adapter may have adapter_config.json only
        return f"did you mean {results}?"
    packed = sorted(path.name for path in directory.glob("*.gguf"))
    if packed:
        return f"{packed[0]} is {GGUF}"
    return "is this the directory of a checkpoint?"


def read_optional_json(path: Path) -> JsonObject | None:
    """Read a JSON object; return None when the file is not there.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    data = read_optional_bytes(path)
    if data is None:
        return None
    found = parse_json(data, str(path))
    if not is_object(found):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_optional_text(path: Path, *, most: int = MOST_BYTES) -> str | None:
    """Read the text of a file; return None when it is not there.

    Raises:
        CheckpointError: not UTF-8, or larger than `most` bytes.
    """
    data = read_optional_bytes(path, most=most)
    return None if data is None else decode_text(data, str(path))


def read_optional_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes | None:
    """Read the content of a small file; return None when it is not there.

    Raises:
        CheckpointError: it is no regular file, cannot be read, or has more than `most` bytes.
    """
    if not has_file(path):
        return None
    data = first_bytes(path, most + 1)
    if len(data) > most:
        raise CheckpointError(f"{path} has more than {most} bytes, the most that are read")
    return data


def first_bytes(path: Path, count: int) -> bytes:
    """Read the beginning of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(min(count, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def has_file(path: Path) -> bool:
    """Return whether a regular file is there.

    Raises:
        CheckpointError: something else has this name, or permission is denied.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # a NUL in the name
        return False
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not path.is_symlink():
            return False
        why = "a link to nothing" if error.errno == errno.ENOENT else error.strerror
        raise CheckpointError(f"{path} cannot be read: {why}") from error
    if stat.S_ISREG(mode):
        return True
    kind = "a directory" if stat.S_ISDIR(mode) else "a device or a pipe"
    raise CheckpointError(f"{path} is {kind}, expected a file")
