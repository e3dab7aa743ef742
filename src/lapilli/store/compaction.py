"""Compaction: small files become large ones, and what was replaced or deleted is dropped."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from lapilli.store.index import ROW_BITS, ROW_MASK, Segment, merge, write_segment
from lapilli.store.manifest import (
    Lock,
    Manifest,
    ShardRecord,
    explaining_disk,
    read_manifest,
    remove_strays,
    store_path,
    write_manifest,
)
from lapilli.store.shard import Array, Rows
from lapilli.store.snapshot import Snapshot, open_snapshot

SHARD_BYTES: Final = 256 << 20
"""Bytes of vectors at which a shard is written."""

_PIECE: Final = 1 << 14  # rows that are copied at once


def compact(path: str | Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Merge small files and drop what was replaced or deleted; return the bytes that became free.

    Readers go on with the files that they have mapped. Entries of one stamp keep their order, but
    for those of large files, which stay as they are.

    Raises:
        StoreError: no store, a damaged one, one that is being written, or the disk does not take
            it: the store is then as it was.
    """
    folder = store_path(path)
    read_manifest(folder)
    with explaining_disk(folder):
        lock = Lock(folder)
        try:
            before = open_snapshot(folder)
            remove_strays(folder, before.manifest)
            after = rewrite(before, shard_bytes, most_dead=0.0)
            return _size(before.manifest) - _size(after.manifest)
        finally:
            lock.release()


def _size(manifest: Manifest) -> int:
    return sum(record.bytes for record in (*manifest.shards, *manifest.indexes))


def rewrite(before: Snapshot, shard_bytes: int, *, most_dead: float) -> Snapshot:
    """Write merged shards and one index, swap the manifest, and return what is then there.

    Large shards stay as they are while no more than a share of `most_dead` of their rows is dead.

    Raises:
        OSError: the disk does not take it; the store is as it was.
    """
    folder, manifest = before.folder, before.manifest
    try:
        move = _Move(before, shard_bytes, most_dead)
        indexes = (write_segment(folder, Segment(move.keys, move.after)),) if len(move.keys) else ()
        after = replace(
            manifest, entries=len(move.keys), shards=tuple(move.shards), indexes=indexes
        )
        after = _with_used_stamps(after)
        write_manifest(folder, after)
    except BaseException:
        remove_strays(folder, read_manifest(folder))  # killed after the swap, it is the new one
        raise
    remove_strays(folder, after)
    return open_snapshot(folder)


class _Move:
    """Where every entry was and is going to be.

    Attributes:
        keys: of all entries, sorted.
        after: their new places.
        shards: files of the new manifest.
    """

    def __init__(self, before: Snapshot, shard_bytes: int, most_dead: float) -> None:
        self._before, self._shard_bytes = before, shard_bytes
        empty = Segment(np.empty(0, "<u8"), np.empty(0, "<i8"))
        found = merge(before.segments or [empty], oldest=True)
        self.keys, self._places = found.keys, found.places
        self.after: Array = np.empty_like(self._places)
        self._order = np.argsort(self._places)
        self._sorted = self._places[self._order]
        self.shards: list[ShardRecord] = []
        numbers = range(len(before.shards))
        kept = [n for n in numbers if self._may_stay(n, most_dead)]
        for number in kept:
            at = self._entries(number)
            self.after[at] = (self._places[at] & ROW_MASK) + (len(self.shards) << ROW_BITS)
            self.shards.append(before.manifest.shards[number])
        for stamp in range(len(before.manifest.stamps)):
            records = before.manifest.shards
            self._copy([n for n in numbers if n not in kept and records[n].stamp == stamp], stamp)

    def _entries(self, number: int) -> Array:
        """Return which entries lie in a shard, in the order of its rows."""
        begin, end = self._sorted.searchsorted([number << ROW_BITS, (number + 1) << ROW_BITS])
        found: Array = self._order[begin:end]
        return found

    def _may_stay(self, number: int, most_dead: float) -> bool:
        shard = self._before.shards[number]
        dead = shard.rows - len(self._entries(number))
        return shard.vectors.nbytes * 2 >= self._shard_bytes and dead <= most_dead * shard.rows

    def _pieces(self, number: int) -> Iterator[Array]:
        at = self._entries(number)
        for start in range(0, len(at), _PIECE):
            yield at[start : start + _PIECE]

    def _copy(self, numbers: list[int], stamp: int) -> None:
        """Copy the entries of some shards into new ones."""
        rows = Rows()
        for number in numbers:
            shard = self._before.shards[number]
            for at in self._pieces(number):
                begin = (len(self.shards) << ROW_BITS) + len(rows.ids)
                self.after[at] = np.arange(begin, begin + len(at))
                taken = self._places[at] & ROW_MASK
                scales = None if shard.scales is None else shard.scales[taken]
                rows.append(shard.vectors[taken], scales, shard.hashes[taken], shard.ids_at(taken))
                if rows.bytes >= self._shard_bytes:
                    self._write(rows, stamp)
                    rows = Rows()
        if rows.ids:
            self._write(rows, stamp)

    def _write(self, rows: Rows, stamp: int) -> None:
        self.shards.append(rows.write(self._before.folder, self._before.manifest, stamp))


def _with_used_stamps(manifest: Manifest) -> Manifest:
    """Return a manifest without the stamps that no shard has any more."""
    used = sorted({record.stamp for record in manifest.shards})
    number = {stamp: at for at, stamp in enumerate(used)}
    return replace(
        manifest,
        stamps=tuple(manifest.stamps[stamp] for stamp in used),
        shards=tuple(replace(record, stamp=number[record.stamp]) for record in manifest.shards),
    )
