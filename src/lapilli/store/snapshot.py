"""Snapshot: the shards and the index of one state of a store, mapped.

    manifest -> segments, shards -> keys -> places -> rows

It stays as it was opened, whatever is written meanwhile.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from lapilli.config.reader import shown
from lapilli.errors import StoreError
from lapilli.shapes import Float, Tensor
from lapilli.store.index import (
    ROW_BITS,
    ROW_MASK,
    UNKNOWN,
    Segment,
    find,
    map_segment,
    merge,
)
from lapilli.store.manifest import Manifest, read_manifest
from lapilli.store.shard import HASH_BYTES, TORCH_DTYPES, Array, Shard, damaged

_TRIES: Final = 20  # of opening while compactions go on


def text_hash(text: object) -> str:
    """Return the hash that an entry keeps of the text it was made of: blake2b, 16 bytes, in hex.

    Raises:
        StoreError: no text.
    """
    if not isinstance(text, str):
        raise StoreError(f"a text is {shown(text)}: expected a string")
    return hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES
    ).hexdigest()


def hashes_of(texts: Iterable[object] | None, hashes: Iterable[str] | None, number: int) -> Array:
    """Return the hashes of texts, or given ones, as bytes [n, 16]; zeros where there are neither.

    Raises:
        StoreError: both are given, another number than of ids, or no such hash.
    """
    if texts is not None and hashes is not None:
        raise StoreError("texts and hashes were given: give one of them, a text has one hash")
    if texts is not None:
        hashes = [text_hash(text) for text in texts]
    if hashes is None:
        return np.zeros((number, HASH_BYTES), "u1")
    listed = list(hashes)
    if len(listed) != number:
        raise StoreError(f"{number} ids but {len(listed)} texts or hashes: give one for each id")
    try:
        raw = b"".join(map(bytes.fromhex, listed))
    except (TypeError, ValueError) as error:
        raise StoreError(f"a hash is no text in hex ({error}): make it with text_hash") from error
    if any(len(one) != 2 * HASH_BYTES for one in listed):
        raise StoreError(f"a hash has not {2 * HASH_BYTES} digits: make it with text_hash")
    return np.frombuffer(raw, "u1").reshape(number, HASH_BYTES)


class Snapshot:
    """The mapped files of one manifest.

    Attributes:
        wrong: numbers of the stamps that are refused, decided before anybody reads.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.shards = [Shard(folder, record, manifest) for record in manifest.shards]
        self.segments: list[Segment] = [
            map_segment(folder, record) for record in reversed(manifest.indexes)
        ]
        self.wrong: frozenset[int] = frozenset()
        self._dtype = TORCH_DTYPES[manifest.dtype]
        self._shape = (-1, manifest.tokens, manifest.width)

    def find(self, keys: Array) -> Array:
        """Return places, negative where there is no entry."""
        return find(self.segments, keys)

    def find_one(self, key: np.uint64) -> int:
        """Return the place of one key, negative where there is no entry."""
        for segment in self.segments:
            place = segment.find_one(key)
            if place != UNKNOWN:
                return place
        return UNKNOWN

    def by_shard(self, places: Array) -> Iterator[tuple[int, Array | slice, Array]]:
        """Yield shard, which of the places lie in it, and their rows there.

        Raises:
            StoreError: a place beyond the shards, which only a damaged index has.
        """
        if len(self.shards) == 1 and (not len(places) or places.max() < self.shards[0].rows):
            yield 0, slice(None), places
            return
        numbers, rows = places >> ROW_BITS, places & ROW_MASK
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            inside = rows[chosen]
            if number >= len(self.shards) or inside.max() >= self.shards[number].rows:
                raise damaged(self.folder, f"an index names row {inside.max()} of shard {number}")
            yield number, chosen, inside

    def ids_at(self, places: Array) -> list[bytes]:
        """Return the ids of places, in UTF-8."""
        found = [b""] * len(places)
        for number, chosen, rows in self.by_shard(places):
            ids = self.shards[number].ids_at(rows)
            if isinstance(chosen, slice):
                return ids
            for at, one in zip(chosen.tolist(), ids, strict=True):
                found[at] = one
        return found

    def has_ids(self, places: Array, ids: Sequence[bytes]) -> bool:
        """Return whether places have these ids, in UTF-8: `ids_at(places) == ids`, faster."""
        return all(
            self.shards[number].has_ids(
                rows, ids if isinstance(chosen, slice) else [ids[at] for at in chosen.tolist()]
            )
            for number, chosen, rows in self.by_shard(places)
        )

    def one_at(self, place: int) -> tuple[Shard, int]:
        """Return the shard and the row of a place.

        Raises:
            StoreError: see `by_shard`.
        """
        number, row = place >> ROW_BITS, place & ROW_MASK
        if number >= len(self.shards) or row >= self.shards[number].rows:
            raise damaged(self.folder, f"an index names row {row} of shard {number}")
        return self.shards[number], row

    def hashes_at(self, places: Array) -> Array:
        """Return the text hashes of places, bytes [n, 16]."""
        found = np.empty((len(places), HASH_BYTES), "u1")
        for number, chosen, rows in self.by_shard(places):
            found[chosen] = self.shards[number].hashes[rows]
        return found

    def vectors_at(self, places: Array, dtype: torch.dtype) -> Float[Tensor, "n T W"]:
        """Return the vectors of places in a dtype."""
        parts = list(self.by_shard(places))
        if len(parts) == 1:
            number, _, rows = parts[0]
            return self.take(self.shards[number], rows, dtype)
        found = torch.empty((len(places), *self._shape[1:]), dtype=dtype)
        for number, chosen, rows in parts:
            found[torch.from_numpy(chosen)] = self.take(self.shards[number], rows, dtype)
        return found

    def take(self, shard: Shard, rows: Array | int, dtype: torch.dtype) -> Tensor:
        """Return copies of the vectors of rows, [n, T_s, W], or of one row, [T_s, W]."""
        one = isinstance(rows, int)
        taken = torch.from_numpy(shard.vectors[rows].copy() if one else shard.vectors.take(rows, 0))
        shape = self._shape[one:]
        if shard.scales is not None:
            scales = torch.from_numpy(shard.scales[rows].copy()).unsqueeze(-1)
            return (taken.view(shape).to(torch.float32) * scales).to(dtype)
        if taken.dtype != self._dtype:  # bfloat16, whose bits numpy keeps
            taken = taken.view(self._dtype)
        return taken.view(shape).to(dtype)

    def live(self) -> Array:
        """Return the places of all entries, in the order of the shards."""
        if not self.segments:
            return np.empty(0, "<i8")
        return np.sort(merge(self.segments, oldest=True).places)

    def stamp_of(self, places: Array) -> Array:
        """Return the number of the stamp of each place, int64 [n]."""
        stamps = np.array([record.stamp for record in self.manifest.shards] or [0])
        found: Array = stamps[places >> ROW_BITS]
        return found


def open_snapshot(folder: Path) -> Snapshot:
    """Map a store as it is now; a compaction that is going on meanwhile is waited for.

    Raises:
        StoreError: no store, or a damaged one.
    """
    manifest = read_manifest(folder)
    for _ in range(_TRIES):
        try:
            return Snapshot(folder, manifest)
        except FileNotFoundError as error:
            now = read_manifest(folder)
            if now == manifest:
                raise damaged(folder, f"{error.filename} is missing") from error
            manifest = now
    raise StoreError(f"{folder} changes faster than it can be opened: try again")


def unchanged(snapshot: Snapshot, keys: Array, hashes: Array, wrong: frozenset[int]) -> Array:
    """Return which entries are there as they would be written, bool [n].

    Args:
        snapshot: what is there.
        keys: of the entries.
        hashes: of their texts; without a text nothing is known, and nothing is unchanged.
        wrong: stamps of other encoders and projectors.
    """
    places = snapshot.find(keys)
    at = np.flatnonzero(places >= 0)
    fresh = np.zeros(len(keys), bool)
    if len(at):
        known = hashes[at].any(axis=1)
        same = (snapshot.hashes_at(places[at]) == hashes[at]).all(axis=1)
        right = ~np.isin(snapshot.stamp_of(places[at]), list(wrong))
        fresh[at] = known & same & right
    return fresh
