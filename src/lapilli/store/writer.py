"""StoreWriter: the one process that changes a store.

    add, delete   -> rows in memory -> a shard file whenever there are enough
    commit        -> an index file of what is new -> the manifest is swapped

Readers see a commit as a whole or not at all. What was not committed is forgotten: a `with` block
that ends in an error, a kill, a full disk.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch

from lapilli.config.reader import shown
from lapilli.errors import StoreError
from lapilli.shapes import Tensor
from lapilli.store.compaction import SHARD_BYTES, rewrite
from lapilli.store.index import (
    DEAD,
    ROW_BITS,
    Segment,
    encode_ids,
    find,
    keys_of,
    merge,
    write_segment,
)
from lapilli.store.manifest import (
    LOCK,
    MANIFEST,
    NUMBER_FORMATS,
    OWN_FILE,
    FileRecord,
    Lock,
    Manifest,
    ShardRecord,
    Stamp,
    explaining_disk,
    read_manifest,
    remove_strays,
    store_path,
    write_manifest,
)
from lapilli.store.reader import Ids, several
from lapilli.store.shard import Array, Rows, to_rows
from lapilli.store.snapshot import Snapshot, hashes_of, open_snapshot, unchanged

_MOST_SHARDS: Final = 128  # then a commit merges the small ones: each costs a mapping and a search


class StoreWriter:
    """Adds, replaces and deletes entries; one at a time has a store.

        with StoreWriter("items", encoder=fingerprint) as writer:
            writer.add(ids, vectors, texts)

    Args:
        path: the folder; made where there is none.
        encoder: fingerprint of the model that the vectors come from.
        projector: fingerprint of the projector that they went through.
        width: numbers of a vector; None: that of the store, or of the first vectors.
        tokens: vectors of an entry, T_s; None: the same.
        dtype: number format; None: that of the store, or float16.
        shard_bytes: size of vectors at which a file is written.

    Raises:
        StoreError: another writer has the store, it is of another width, number of vectors or
            format, or the folder holds something else.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        encoder: str,
        projector: str | None = None,
        width: int | None = None,
        tokens: int | None = None,
        dtype: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if not isinstance(encoder, str) or not encoder:
            raise StoreError(
                f"encoder is {shown(encoder)}: expected a fingerprint, such as "
                "lapilli.store.encode.fingerprint makes of a model"
            )
        if dtype is not None and dtype not in NUMBER_FORMATS:
            raise StoreError(
                f"number format {shown(dtype)}: expected one of {', '.join(NUMBER_FORMATS)}"
            )
        for name, size in (("width", width), ("tokens", tokens)):
            if size is not None and (type(size) is not int or size < 1):
                raise StoreError(f"{name} is {shown(size)}: expected a whole number from 1 on")
        self.path = store_path(path)
        self._stamp = Stamp(encoder=encoder, projector=projector)
        self._wanted = {"width": width, "tokens": tokens, "dtype": dtype}
        self._shard_bytes = shard_bytes
        self._lock: Lock | None = _begin(self.path)
        try:
            self._snapshot: Snapshot | None = None
            if (self.path / MANIFEST).exists():
                self._snapshot = open_snapshot(self.path)
                self._check_fits()
            remove_strays(self.path, self._committed)
        except BaseException:
            self.discard()
            raise
        self._forget()

    def _forget(self) -> None:
        """Begin anew after a commit."""
        self._rows = Rows()
        self._shards: list[ShardRecord] = []
        self._changes: list[tuple[Array, Array]] = []  # keys, places
        self._touched: set[int] = set()  # keys that are committed and have changed since

    def _check_fits(self) -> None:
        """Compare what was asked for with what is there."""
        assert self._snapshot is not None  # noqa: S101 - the caller looked
        for name, wanted in self._wanted.items():
            found = getattr(self._snapshot.manifest, name)
            if wanted not in (None, found):
                raise StoreError(
                    f"{self.path} has {name} {found}, and {shown(wanted)} was asked for: write to "
                    "another folder"
                )

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._lock is not None:
                self.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget what was not committed, and let go of the store."""
        if self._lock is not None:
            with suppress(OSError):  # a disk that fails may fail here too: the next writer does it
                # Of a store that could not be opened nothing is removed: the rest of it is whole.
                if self._snapshot is not None or not (self.path / MANIFEST).exists():
                    remove_strays(self.path, self._committed)
            self._lock.release()
            self._lock = None

    @property
    def _committed(self) -> Manifest | None:
        return None if self._snapshot is None else self._snapshot.manifest

    @property
    def is_open(self) -> bool:
        """Return whether it can still write: it ends with its block, and when the disk fails."""
        return self._lock is not None

    def _check_open(self) -> None:
        if self._lock is None:
            raise StoreError(f"this writer of {self.path} has ended: make another one")

    def needed(
        self,
        ids: Ids,
        texts: Iterable[object] | None = None,
        *,
        hashes: Iterable[str] | None = None,
    ) -> list[int]:
        """Return which ids have to be encoded, as of the last commit; see Store.needed."""
        encoded = encode_ids(several(ids))
        wanted = hashes_of(texts, hashes, len(encoded))
        return np.flatnonzero(~self._unchanged(keys_of(encoded), wanted)).tolist()

    def _unchanged(self, keys: Array, hashes: Array) -> Array:
        if self._snapshot is None:
            return np.zeros(len(keys), bool)
        stamps = self._snapshot.manifest.stamps
        wrong = frozenset(i for i, stamp in enumerate(stamps) if stamp != self._stamp)
        fresh = unchanged(self._snapshot, keys, hashes, wrong)
        if self._touched:
            fresh &= [key not in self._touched for key in keys.tolist()]
        return fresh

    def add(
        self,
        ids: Ids,
        vectors: Tensor | Array,
        texts: Iterable[object] | None = None,
        *,
        hashes: Iterable[str] | None = None,
    ) -> int:
        """Add entries, or replace those that are there; return how many are new or changed.

        An entry of the same text from the same encoder is left as it is.

        Args:
            ids: texts or whole numbers, each once.
            vectors: [n, T_s, W], or [n, W] where T_s is 1.
            texts: what the vectors were made of; None: not known, so every entry is written.
            hashes: of the texts, in place of them; see `text_hash`.

        Raises:
            StoreError: vectors of another width or number, NaN, infinite numbers, an id that comes
                twice, or the disk does not take it. What was added since the last commit is then
                forgotten only if it was the disk.
        """
        self._check_open()
        encoded = encode_ids(several(ids))
        _check_ids(encoded)
        stacked = self._check_vectors(vectors, encoded)
        wanted = hashes_of(texts, hashes, len(encoded))
        if not encoded:
            return 0
        manifest = self._manifest(stacked)
        keys = keys_of(encoded)
        self._check_collisions(encoded, keys)
        changed = np.flatnonzero(~self._unchanged(keys, wanted))
        if not len(changed):
            return 0
        if len(changed) < len(encoded):
            stacked = stacked[torch.from_numpy(changed)]
        raw, scales = to_rows(stacked, manifest.dtype)
        numbers = changed.tolist()
        shard = len(manifest.shards) + len(self._shards)
        row = len(self._rows.ids)
        places = (shard << ROW_BITS) + np.arange(row, row + len(numbers), dtype="<i8")
        self._note(keys[changed], places)
        self._rows.append(
            raw,
            scales,
            wanted[changed],
            [encoded[number] for number in numbers],
        )
        if self._rows.bytes >= self._shard_bytes:
            self._write_rows()
        return len(numbers)

    def _check_vectors(self, vectors: Any, ids: Sequence[bytes]) -> Tensor:  # noqa: ANN401
        number = len(ids)
        found = tensor_of(vectors)
        if found.ndim == 2:
            found = found.unsqueeze(1)
        if found.ndim != 3 or not found.is_floating_point():
            raise StoreError(
                f"vectors are {found.dtype} {list(found.shape)}: expected floating point numbers "
                "[n, T_s, width], or [n, width]"
            )
        if len(found) != number:
            raise StoreError(f"{number} ids but {len(found)} vectors: give one entry for each id")
        here = None if self._snapshot is None else self._snapshot.manifest
        tokens = self._wanted["tokens"] if here is None else here.tokens
        width = self._wanted["width"] if here is None else here.width
        if number and (tokens not in (None, found.shape[1]) or width not in (None, found.shape[2])):
            raise StoreError(
                f"vectors are [{number}, {found.shape[1]}, {found.shape[2]}]: {self.path} has "
                f"entries of [{tokens or 'T_s'}, {width or 'width'}]"
            )
        finite = torch.isfinite(found).flatten(1).all(dim=1)
        if not bool(finite.all()):
            name = ids[int(finite.int().argmin())].decode()
            raise StoreError(f"the vector of id {shown(name)} has a NaN or an infinite number")
        return found

    def _manifest(self, vectors: Tensor | None = None) -> Manifest:
        """Return the manifest as of the last commit; the first vectors decide what nobody said."""
        if self._snapshot is not None:
            return self._snapshot.manifest
        if vectors is not None:
            for name, found in (("tokens", vectors.shape[1]), ("width", vectors.shape[2])):
                self._wanted[name] = found
        width, tokens = self._wanted["width"], self._wanted["tokens"] or 1
        if width is None:
            raise StoreError(f"{self.path} would be empty: add vectors, or say their width")
        return Manifest(
            width=int(width), tokens=int(tokens), dtype=str(self._wanted["dtype"] or "float16")
        )

    def _check_collisions(self, ids: Sequence[bytes], keys: Array) -> None:
        """Refuse an id whose key is that of another id."""
        if self._snapshot is None:
            return
        places = self._snapshot.find(keys)
        at = np.flatnonzero(places >= 0)
        for number, found in zip(at.tolist(), self._snapshot.ids_at(places[at]), strict=True):
            if found != ids[number]:
                raise _collision(found, ids[number])

    def _note(self, keys: Array, places: Array) -> None:
        self._changes.append((keys, places))
        if self._snapshot is not None and len(self._snapshot.shards):
            known = self._snapshot.find(keys) >= 0
            self._touched.update(keys[known].tolist())

    def delete(self, ids: Ids) -> None:
        """Delete entries.

        Raises:
            StoreError: an id that is not there.
        """
        self._check_open()
        encoded = encode_ids(several(ids))
        keys = keys_of(encoded)
        places = self._now(keys)
        missing = [encoded[at].decode("utf-8", "replace") for at in np.flatnonzero(places < 0)]
        if missing:
            raise StoreError(f"{self.path} has no entry for {shown(missing)}: nothing was deleted")
        if encoded:
            self._note(keys, np.full(len(keys), DEAD, "<i8"))

    def _now(self, keys: Array) -> Array:
        """Return the places of keys with what was added since the commit."""
        segments = [*self._fresh_segments(), *(self._snapshot.segments if self._snapshot else [])]
        return find(segments, keys)

    def _fresh_segments(self) -> list[Segment]:
        """Return what has changed since the commit, as one sorted segment; none without changes."""
        if not self._changes:
            return []
        newest = [Segment(keys, places) for keys, places in reversed(self._changes)]
        # Inside of one change every key stands once.
        return [merge(newest, oldest=False)]

    def _write_rows(self) -> None:
        if not self._rows.ids:
            return
        with self._ending_on_disk():
            stamps = self._manifest().stamps
            number = stamps.index(self._stamp) if self._stamp in stamps else len(stamps)
            self._shards.append(self._rows.write(self.path, self._manifest(), number))
        self._rows = Rows()

    @contextmanager
    def _ending_on_disk(self) -> Iterator[None]:
        """End with the disk: nobody knows which of the bytes are there."""
        with explaining_disk(self.path):
            try:
                yield
            except OSError:
                self.discard()
                raise

    def commit(self) -> int:
        """Make what was added and deleted part of the store; return how many entries it has.

        Raises:
            StoreError: the disk does not take it: the writer ends, and the store is as it was
                after the last commit. Or two new ids have one key.
        """
        self._check_open()
        before = self._manifest()
        if not self._changes and self._snapshot is not None:
            return before.entries
        self._write_rows()
        fresh = self._fresh_segments()
        self._check_new_ids(before)
        with self._ending_on_disk():
            manifest = replace(
                before,
                entries=before.entries + self._growth(fresh),
                stamps=before.stamps
                if self._stamp in before.stamps
                else (*before.stamps, self._stamp),
                shards=(*before.shards, *self._shards),
                indexes=self._indexes(before, fresh),
            )
            write_manifest(self.path, manifest)
            self._snapshot = open_snapshot(self.path)
            remove_strays(self.path, manifest)
            self._forget()
            if len(manifest.shards) > _MOST_SHARDS:
                self._snapshot = rewrite(self._snapshot, self._shard_bytes, most_dead=0.5)
        return self._snapshot.manifest.entries

    def _growth(self, fresh: Sequence[Segment]) -> int:
        """Return how many entries there are more than before."""
        if not fresh:
            return 0
        before = find(self._snapshot.segments if self._snapshot else [], fresh[0].keys)
        return int((fresh[0].places >= 0).sum()) - int((before >= 0).sum())

    def _check_new_ids(self, before: Manifest) -> None:
        """Refuse two ids of one key among those that were added since the commit."""
        keys = np.concatenate([keys for keys, _ in self._changes] or [np.empty(0, "<u8")])
        places = np.concatenate([places for _, places in self._changes] or [np.empty(0, "<i8")])
        keys, places = keys[places >= 0], places[places >= 0]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        if not len(same):
            return
        written = Snapshot(self.path, replace(before, shards=(*before.shards, *self._shards)))
        one, other = (written.ids_at(places[order][at]) for at in (same, same + 1))
        for found, second in zip(one, other, strict=True):
            if found != second:
                raise _collision(found, second)

    def _indexes(self, before: Manifest, fresh: list[Segment]) -> tuple[FileRecord, ...]:
        """Write the index of a commit; return the records of all, the oldest first."""
        if not fresh:
            return before.indexes
        kept = list(before.indexes)
        segments = list(self._snapshot.segments) if self._snapshot else []  # the newest first
        taken, size = list(fresh), len(fresh[0].keys)
        while kept and kept[-1].rows <= 2 * size:
            size += kept.pop().rows
            taken.append(segments.pop(0))
        merged = merge(taken, oldest=not kept)
        if not len(merged.keys):
            return tuple(kept)
        return (*kept, write_segment(self.path, merged))


def _begin(folder: Path) -> Lock:
    """Make the folder of a store, and take its lock.

    Raises:
        StoreError: it holds something else, cannot be made, or another writer has it.
    """
    with explaining_disk(folder):
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file: a store is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in folder.iterdir()]
        foreign = [name for name in names if not OWN_FILE.fullmatch(name) and name not in _OWN]
        if foreign and MANIFEST not in names:
            raise StoreError(
                f"{folder} is no store, and holds {shown(sorted(foreign)[0])}: give another folder"
            )
        if MANIFEST in names:
            read_manifest(folder)  # before anything is written into what is no store
        return Lock(folder)


_OWN: Final = {MANIFEST, f"{MANIFEST}.part", LOCK}


def _check_ids(ids: Sequence[bytes]) -> None:
    if b"" in ids:
        raise StoreError("an id is empty: expected a text or a whole number")
    if len(set(ids)) != len(ids):
        seen: set[bytes] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise StoreError(f"id {shown(twice.decode())} comes twice: give each id once")


def tensor_of(vectors: Any) -> Tensor:  # noqa: ANN401 - anything that somebody takes for vectors
    """Return vectors on the CPU.

    Raises:
        StoreError: no numbers, or numbers that are nowhere or only in places.
    """
    # Copied where they may not be written, of which torch would warn.
    locked = isinstance(vectors, np.ndarray) and not vectors.flags.writeable
    try:
        found = torch.as_tensor(vectors.copy() if locked else vectors).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"vectors are {shown(vectors)}: expected numbers ({error})") from error
    if found.is_meta or found.layout != torch.strided:
        raise StoreError(
            f"vectors are on the device {found.device} in the layout {found.layout}: expected a "
            "dense tensor of numbers"
        )
    return found.to("cpu")


def _collision(one: bytes, other: bytes) -> StoreError:
    return StoreError(
        f"ids {shown(one.decode())} and {shown(other.decode())} have the same 64-bit key: rename "
        "one of them"
    )
