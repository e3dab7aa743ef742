"""Index: from ids to places, by binary search in sorted 64-bit keys.

The key of an id is the blake2b digest of its UTF-8 text with 8 bytes, read as a little-endian
number: public, the same in every language, and spread evenly. Two ids of one key are refused when
the second is written, as the ids themselves are kept; among ten million ids that happens once in
half a million stores. Resolving it instead would cost every lookup a second step for nothing.

An index is a few segments, each sorted, of which the newest that has a key is right. A commit adds
one, and merges those behind it that are not twice as long: n entries have log2(n) segments, and
a commit of a few writes a few.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lapilli.config.reader import shown
from lapilli.errors import StoreError
from lapilli.kernels.digest import digests
from lapilli.store.manifest import FileRecord
from lapilli.store.shard import Array, map_arrays, write_arrays

DEAD: Final = -1
"""Place of an id that was deleted."""
UNKNOWN: Final = -2
"""Place of an id that was never there."""
ROW_BITS: Final = 32
ROW_MASK: Final = (1 << ROW_BITS) - 1
_EVERY: Final = 32
_WINDOW: Final = np.arange(_EVERY)
_FEW: Final = 1 << 18  # keys that a cache holds
_MOST_WINDOWS: Final = 1 << 13  # whose keys are copied at once


def encode_ids(ids: Iterable[object]) -> list[bytes]:
    """Return ids in UTF-8; whole numbers as their decimal text.

    Raises:
        StoreError: neither text nor a whole number.
    """
    try:
        return [one.encode() if type(one) is str else _encode(one) for one in ids]
    except UnicodeEncodeError as error:
        raise StoreError(f"an id is no text that UTF-8 can say: {shown(error.object)}") from error


def _encode(one: object) -> bytes:
    if isinstance(one, str):
        return one.encode()
    if isinstance(one, bool | np.bool_) or not hasattr(one, "__index__"):
        raise StoreError(f"an id is {shown(one)}: expected a text or a whole number")
    return str(one.__index__()).encode()


def keys_of(ids: Sequence[bytes]) -> Array:
    """Return the keys of ids, uint64 [n]."""
    return digests(ids)


class Segment:
    """Sorted keys and the places of their entries.

    A search among many keys waits for memory at every step, so few keys are looked for in two
    steps: in a sample of every 32nd key, which stays in the cache, and in the 32 that follow.

    Args:
        keys: uint64 [n], ascending, each once.
        places: int64 [n].
        samples: every 32nd key, as an array of its own; None: taken out of the keys.
    """

    def __init__(self, keys: Array, places: Array, samples: Array | None = None) -> None:
        self.keys, self.places = keys, places
        self.samples: Array = keys[::_EVERY].copy() if samples is None else samples
        self._last = len(keys) - 1

    def find(self, keys: Array) -> Array:
        """Return places, int64 [n]: DEAD for what was deleted, UNKNOWN for what is not here."""
        is_small = self._last < _FEW or len(keys) > _MOST_WINDOWS
        at = self.keys.searchsorted(keys) if is_small else self._search_in_two_steps(keys)
        at = np.minimum(at, self._last)
        return np.where(self.keys.take(at) == keys, self.places.take(at), UNKNOWN)

    def _search_in_two_steps(self, keys: Array) -> Array:
        """Return what `searchsorted` returns, for keys that are there."""
        begin = np.maximum(self.samples.searchsorted(keys, side="right") - 1, 0) * _EVERY
        window = self.keys.take(begin[:, None] + _WINDOW, mode="clip")
        at: Array = begin + (window < keys[:, None]).sum(axis=1)
        return at

    def find_one(self, key: np.uint64) -> int:
        """Return the place of one key; see `find`."""
        at = int(self.keys.searchsorted(key))
        if at > self._last or self.keys[at] != key:
            return UNKNOWN
        return int(self.places[at])


def map_segment(folder: Path, record: FileRecord) -> Segment:
    """Map a segment.

    Raises:
        FileNotFoundError, StoreError: see `map_arrays`.
    """
    shape = (record.rows,)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "keys": ("U64", shape),
        "places": ("I64", shape),
        "samples": ("U64", (-(-record.rows // _EVERY),)),
    }
    arrays = map_arrays(folder, record, expected).arrays
    return Segment(arrays["keys"], arrays["places"], arrays["samples"])


def write_segment(folder: Path, segment: Segment) -> FileRecord:
    """Write a segment to a new file.

    Raises:
        OSError: the disk does not take it.
    """
    arrays: dict[str, tuple[str, Any]] = {
        "keys": ("U64", segment.keys),
        "places": ("I64", segment.places),
        "samples": ("U64", segment.samples),
    }
    return write_arrays(folder, "index", arrays)


def find(segments: Sequence[Segment], keys: Array) -> Array:
    """Return the places of keys, int64 [n], DEAD or UNKNOWN where there is none.

    Args:
        segments: the newest first.
        keys: uint64 [n].
    """
    if not segments:
        return np.full(len(keys), UNKNOWN, "<i8")
    places: Array = segments[0].find(keys)
    for older in segments[1:]:
        missing = np.flatnonzero(places == UNKNOWN)
        if not len(missing):
            break
        places[missing] = older.find(keys[missing])
    return places


def merge(segments: Sequence[Segment], *, oldest: bool) -> Segment:
    """Return one segment for several.

    Args:
        segments: the newest first.
        oldest: there is none behind them, so that what was deleted can be forgotten.
    """
    keys = np.concatenate([segment.keys for segment in segments])
    places = np.concatenate([segment.places for segment in segments])
    keys, first = np.unique(keys, return_index=True)  # the first of equals: the newest
    places = places[first]
    if oldest:
        alive = places != DEAD
        keys, places = keys[alive], places[alive]
    return Segment(keys, places)
