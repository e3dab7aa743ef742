"""Manifest: which files a store consists of; swapping it is the only way that a store changes.

    manifest.json                width, vectors per entry, number format, stamps, files, digests
    shard-<hex>.safetensors      vectors, ids and text hashes of some entries; never rewritten
    index-<hex>.safetensors      sorted keys of ids -> places; of two files the newer one is right
    lock                         held by the one process that writes

A change writes new files under names that were never used, flushes them, and renames a new manifest
over the old one. A kill at any moment leaves the old store or the new one; files that no manifest
names are removed by the next writer. Readers keep the files that they have mapped.

A place is shard << 32 | row, where a shard is its number in the manifest.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lapilli.config.reader import given_path, shown
from lapilli.disk import FULL_DISK, advice_on, flush_path, take_lock
from lapilli.errors import StoreError

FORMAT: Final = "lapilli.store"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
LOCK: Final = "lock"
NUMBER_FORMATS: Final = ("float16", "bfloat16", "float32", "int8")
OWN_FILE: Final = re.compile(r"(?:shard|index)-[0-9a-f]{16}\.safetensors")

_PART: Final = "manifest.json.part"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MOST_ROWS: Final = 1 << 31  # of a shard, so that a place fits 63 bits
_MOST_NUMBERS: Final = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What made the vectors of an entry.

    Attributes:
        encoder: fingerprint of the model that the vectors come from.
        projector: fingerprint of the projector that they went through; None: none.
    """

    encoder: str
    projector: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of a store: its name, its entries, its size in bytes and its SHA-256."""

    file: str
    rows: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord(FileRecord):
    """A file of vectors; `stamp` is the number of what made them, in `Manifest.stamps`."""

    stamp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A store at one moment.

    Attributes:
        width: numbers of one vector.
        tokens: vectors of one entry, T_s of MixLM.
        dtype: number format, one of NUMBER_FORMATS.
        entries: ids that are there.
        stamps: what made the vectors of the shards.
        shards: files of vectors; a place counts them.
        indexes: files of keys, the oldest first.
    """

    width: int
    tokens: int
    dtype: str
    entries: int = 0
    stamps: tuple[Stamp, ...] = ()
    shards: tuple[ShardRecord, ...] = ()
    indexes: tuple[FileRecord, ...] = ()

    def __post_init__(self) -> None:
        for name in ("width", "tokens"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < _MOST_NUMBERS:
                raise StoreError(f"{name} is {shown(value)}: expected a whole number from 1 on")
        if self.dtype not in NUMBER_FORMATS:
            known = ", ".join(NUMBER_FORMATS)
            raise StoreError(f"number format {shown(self.dtype)}: expected one of {known}")

    @property
    def files(self) -> frozenset[str]:
        """Return the names of all files."""
        return frozenset(record.file for record in (*self.shards, *self.indexes))

    @property
    def rows(self) -> int:
        """Return the entries in the shards, replaced and deleted ones included."""
        return sum(shard.rows for shard in self.shards)


def store_path(path: str | Path) -> Path:
    """Return the folder that a person means.

    Raises:
        StoreError: no file system has such a name.
    """
    folder = given_path(path)
    if "\0" in str(folder):
        raise StoreError(f"a store is called {shown(str(folder))}: a name has no NUL in it")
    return folder


def read_manifest(folder: Path) -> Manifest:
    """Read what a store consists of.

    Raises:
        StoreError: there is no store, or its manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _no_store(folder) from error
    except NotADirectoryError as error:
        raise StoreError(f"{folder} is a file: a store is a folder with {MANIFEST}") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is no JSON, or a part of one") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(f"{path} is no manifest of a store: expected format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise StoreError(
            f"{path} has version {shown(content.get('version'))}, expected {VERSION}: read it with "
            "the lapilli that wrote it, or build the store again"
        )
    try:
        return _parse(content, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{error!r:.100}") from error


def _no_store(folder: Path) -> StoreError:
    if not folder.exists():
        return StoreError(f"{folder} is not there: expected a store, a folder with {MANIFEST}")
    if any(OWN_FILE.fullmatch(path.name) or path.name == LOCK for path in folder.iterdir()):
        return StoreError(
            f"{folder} is a store that was never finished (no {MANIFEST}): it is being written, or "
            "its first writer was stopped; run that again"
        )
    return StoreError(f"{folder} is no store: it has no {MANIFEST}")


def _parse(content: Mapping[str, Any], path: Path) -> Manifest:
    stamps = tuple(Stamp(**stamp) for stamp in content["stamps"])
    shards = tuple(ShardRecord(**record) for record in content["shards"])
    indexes = tuple(FileRecord(**record) for record in content["indexes"])
    for stamp in stamps:
        if not (isinstance(stamp.encoder, str) and isinstance(stamp.projector, str | None)):
            raise _damaged(path, f"a stamp is {shown(asdict(stamp))}")
    for record in (*shards, *indexes):
        _check_record(record, path)
    for shard in shards:
        if type(shard.stamp) is not int or not 0 <= shard.stamp < len(stamps):
            raise _damaged(path, f"{shard.file} has the stamp {shown(shard.stamp)}")
    entries = content["entries"]
    if type(entries) is not int or not 0 <= entries <= sum(shard.rows for shard in shards):
        raise _damaged(path, f"it says {shown(entries)} entries")
    return Manifest(
        width=content["width"],
        tokens=content["tokens"],
        dtype=content["dtype"],
        entries=entries,
        stamps=stamps,
        shards=shards,
        indexes=indexes,
    )


def _check_record(record: FileRecord, path: Path) -> None:
    if not (
        isinstance(record.file, str)
        and OWN_FILE.fullmatch(record.file)
        and isinstance(record.digest, str)
        and _DIGEST.fullmatch(record.digest)
        and type(record.rows) is int
        and 0 < record.rows < _MOST_ROWS
        and type(record.bytes) is int
        and record.bytes > 0
    ):
        raise _damaged(path, f"a file is {shown(asdict(record))}")


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}; restore the store from a copy, or build it again")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the store what a manifest says, in one step; every file it names is on the disk."""
    flush_path(folder)  # the names of the new files
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    part = folder / _PART
    with part.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)
    flush_path(folder)


def new_name(kind: str) -> str:
    """Return a name for a shard or an index that no file ever had."""
    return f"{kind}-{secrets.token_hex(8)}.safetensors"


def remove_strays(folder: Path, manifest: Manifest | None) -> None:
    """Remove what a killed writer left, and what a newer manifest no longer names.

    A file that the system does not let go of, as Windows does not while it is mapped, stays until
    the next time.
    """
    kept = frozenset() if manifest is None else manifest.files
    for path in list(folder.iterdir()):
        if path.name == _PART or (OWN_FILE.fullmatch(path.name) and path.name not in kept):
            with suppress(OSError):
                path.unlink()


@contextmanager
def explaining_disk(folder: Path) -> Iterator[None]:
    """Raise what the disk refuses as an error that says what to do.

    Raises:
        StoreError: the disk is full, or may not be written.
    """
    try:
        yield
    except OSError as error:
        what = "is full" if error.errno in FULL_DISK else "cannot be written"
        raise StoreError(
            f"{folder}: the disk {what} ({error.strerror or error}); what was committed before is "
            f"untouched. {advice_on(error)} and start again"
        ) from error


class Lock:
    """The right to change a store, until it is let go of or the process ends.

    Raises:
        StoreError: another writer has it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / LOCK).open("ab")
        if not take_lock(self._file.fileno()):
            self._file.close()
            raise StoreError(
                f"{folder} is being written by another process (or another writer in this one): "
                "wait for it; readers need not"
            )

    def release(self) -> None:
        """Let another writer begin."""
        self._file.close()
