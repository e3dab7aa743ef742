"""Source of a checkpoint: a directory, a hub id or the embedded `pebble`; no file is read here.

The only file of lapilli that uses the hub. Cache, token, mirror and offline mode are those of
huggingface_hub (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lapilli.checkpoint.formats.files import GGUF, first_bytes
from lapilli.config.reader import given_path, shown
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

    Args:
        source: a directory, a hub id ("owner/name" or "owner/name@revision") or "pebble".
        weights: also fetch the weights; False fetches the small files only.
        beside: directories that a relative path may start from, before the working directory.

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
