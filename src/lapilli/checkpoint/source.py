"""Source of a checkpoint: its directory, found here or on the hub, and the small files inside.

A source is a directory, a hub id or the embedded `pebble`. This is the only file of lapilli that
uses the hub; cache, token, mirror and offline mode are those of huggingface_hub (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE). Only regular files are opened, with errors that name them: a name may
be a directory, a device, a pipe that never ends, or a link to itself.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

from lapilli.config.reader import (
    MOST_BYTES,
    JsonObject,
    decode_text,
    given_path,
    is_object,
    parse_json,
    shown,
)
from lapilli.errors import CheckpointError, MissingFileError

PEBBLE = "pebble"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")

# Files of a checkpoint besides its weights. Folders inside a repository hold other formats of the
# same model and are not fetched.
SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "mm_projector.bin",
    "non_lora_trainables.bin",
]
SAFE_WEIGHTS = ["*.safetensors"]
PICKLED_WEIGHTS = ["pytorch_model*.bin", "adapter_model.bin"]


def resolve(source: str | Path, *, weights: bool = True, beside: Sequence[Path] = ()) -> Path:
    """Return the directory of a checkpoint, fetched from the hub when it is not on this disk.

    The source is a directory, a hub id ("owner/name" or "owner/name@revision") or "pebble". A
    relative path may start from one of `beside`, before the working directory; with weights=False
    only the small files are fetched.

    Raises:
        MissingFileError: no such directory, hub id or revision, or it cannot be fetched.
        CheckpointError: a file instead of a directory, or no name at all.
    """
    if not isinstance(source, str | Path):
        raise CheckpointError(
            f"a checkpoint must be a directory, a hub id or 'pebble', got {shown(source)}"
        )
    name = str(source)
    if name == PEBBLE:
        return _embedded()
    found = find_directory(name, beside)
    if found is not None:
        return found
    if isinstance(source, Path) or not HUB_ID.fullmatch(name):
        raise MissingFileError(
            f"{shown(name)} is neither a directory nor a hub id such as owner/name: check the path "
            f"({shown(str(_place(name)))[1:-1]})"
        )
    return fetch_snapshot(name, weights=weights)


def find_directory(name: str, beside: Sequence[Path] = ()) -> Path | None:
    """Return the local directory of this name, or None.

    Raises:
        CheckpointError: there is a file of this name.
    """
    path = given_path(name)
    for candidate in (*(start / path for start in beside), path):
        try:
            if candidate.is_dir():
                return candidate.resolve()
            is_file = candidate.is_file()
        except OSError as error:  # a name that is too long, a directory without permission
            raise CheckpointError(f"{shown(name)} cannot be read: {error.strerror}") from error
        if is_file and first_bytes(candidate, 4) == b"GGUF":
            raise CheckpointError(f"{shown(name)} is {GGUF}")
        if is_file:
            raise CheckpointError(
                f"{shown(name)} is a file: give the directory that holds config.json and the "
                "weights"
            )
    return None


def _place(name: str) -> Path:
    """Return the absolute path of a directory of this name."""
    return given_path(name).absolute()


def is_local(source: str | Path) -> bool:
    """Return whether a source is on this disk, without asking the hub."""
    return str(source) == PEBBLE or find_directory(str(source)) is not None


def _embedded() -> Path:
    path = Path(str(files("lapilli"))) / PEBBLE
    if not (path / "config.json").is_file():
        raise MissingFileError(
            "the embedded model 'pebble' is not in this installation: run `make pebble`, "
            "or give a directory or hub id"
        )
    return path


def fetch_snapshot(name: str, *, weights: bool = True) -> Path:
    """Fetch a repository of the hub into its local cache; safetensors first, else pickles.

    Raises:
        MissingFileError: it does not exist, is not accessible, or offline and not in the cache.
    """
    path = _snapshot(name, SMALL_FILES)
    if not weights:
        return path
    path = _snapshot(name, SAFE_WEIGHTS)
    if not any(path.glob("*.safetensors")):
        path = _snapshot(name, PICKLED_WEIGHTS)
    return path


def _snapshot(name: str, patterns: list[str]) -> Path:
    # Imported here: its import is slow, and a local checkpoint does not need it.
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    try:
        path = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
        )
    except errors.LocalEntryNotFoundError as error:
        raise MissingFileError(
            f"{name!r} is neither a directory nor in the hub's local cache, and the hub cannot be "
            f"reached (offline?): check the path ({_place(name)}), or fetch it once with a "
            "connection"
        ) from error
    except errors.GatedRepoError as error:
        raise MissingFileError(
            f"the hub repository {repository!r} is gated: accept its terms on the hub and log in"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingFileError(
            f"the hub repository {repository!r} has no revision {revision!r}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MissingFileError(
            f"{name!r} is neither a directory ({_place(name)}) nor a repository of the hub: check "
            "the spelling (private repositories need a login)"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise MissingFileError(f"{name!r} could not be fetched from the hub: {error}") from error
    return Path(path)


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
