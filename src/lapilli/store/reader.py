"""Store: embeddings by id, read from mapped files.

    ids -> UTF-8 -> keys -> places -> rows of shards -> Tensor [n, T_s, W]
           encode_ids  keys_of  index.find     take

A Store keeps the snapshot that it opened, whatever is written meanwhile; `reload` moves on. Any
number of threads and processes may read one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, SupportsIndex

import numpy as np
import torch

from lapilli.config.reader import shown
from lapilli.errors import StoreError
from lapilli.shapes import Tensor
from lapilli.store.index import (
    encode_ids,
    keys_of,
)
from lapilli.store.manifest import Stamp, read_manifest, store_path
from lapilli.store.shard import TORCH_DTYPES, Array, check_digest
from lapilli.store.snapshot import Snapshot, hashes_of, open_snapshot, unchanged

Ids = str | SupportsIndex | Iterable[object]

_SHOWN: Final = 5  # ids that a message names
_PIECE: Final = 1 << 16  # rows whose ids are decoded at once


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a store is, without reading its vectors.

    Attributes:
        path: the folder.
        entries: ids that are there.
        width: numbers of one vector.
        tokens: vectors of one entry.
        dtype: number format.
        stamps: what made the vectors, and how many rows of each there are.
        shards: files of vectors.
        dead: rows that were replaced or deleted; `compact` drops them.
        bytes: size of all files.
    """

    path: Path
    entries: int
    width: int
    tokens: int
    dtype: str
    stamps: Mapping[Stamp, int]
    shards: int
    dead: int
    bytes: int


class Store:
    """Embeddings by id, as they were when the store was opened.

    Args:
        path: the folder.
        encoder: fingerprint of the model whose vectors are wanted; vectors of another one are
            refused. None: any.
        projector: the same of the projector.

    Raises:
        StoreError: no store, a damaged one, one of another version, or one that has nothing from
            this encoder.

    Source: MixLM (arXiv 2512.07846), whose items are encoded once and looked up when they are
    ranked.
    """

    def __init__(
        self, path: str | Path, *, encoder: str | None = None, projector: str | None = None
    ) -> None:
        self.path = store_path(path)
        self.encoder, self.projector = encoder, projector
        self._snapshot = open_snapshot(self.path)
        self._snapshot.wrong = self._wrong_stamps(self._snapshot)
        stamps = self._snapshot.manifest.stamps
        if len(self) and len(self._snapshot.wrong) == len(stamps):
            raise self._stale(stamps[0], "every entry")

    @classmethod
    def open(
        cls, path: str | Path, *, encoder: str | None = None, projector: str | None = None
    ) -> "Store":
        """Open a store; see the class."""
        return cls(path, encoder=encoder, projector=projector)

    def __reduce__(self) -> tuple[object, ...]:
        """Open it again in another process, as it is then."""
        return _reopen, (self.path, self.encoder, self.projector)

    def reload(self) -> bool:
        """Move on to what is there now; return whether that is anything new.

        Raises:
            StoreError: see the class; the store stays at what it had.
        """
        if read_manifest(self.path) == self._snapshot.manifest:
            return False
        fresh = open_snapshot(self.path)
        fresh.wrong = self._wrong_stamps(fresh)
        self._snapshot = fresh  # in one step: other threads read meanwhile
        return True

    def _wrong_stamps(self, snapshot: Snapshot, encoder: str | None = None) -> frozenset[int]:
        """Return the stamps that are refused, by the store or by one call with this encoder."""
        return frozenset(
            number
            for number, stamp in enumerate(snapshot.manifest.stamps)
            if (self.encoder not in (None, stamp.encoder))
            or (encoder not in (None, stamp.encoder))
            or (self.projector not in (None, stamp.projector))
        )

    def __len__(self) -> int:
        return self._snapshot.manifest.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    @property
    def width(self) -> int:
        """Numbers of one vector."""
        return self._snapshot.manifest.width

    @property
    def tokens(self) -> int:
        """Vectors of one entry."""
        return self._snapshot.manifest.tokens

    @property
    def dtype(self) -> str:
        """Number format of the files."""
        return self._snapshot.manifest.dtype

    def __contains__(self, one: object) -> bool:
        """Return whether there is an entry, from whatever encoder."""
        ids = encode_ids([one])
        snapshot = self._snapshot
        places = snapshot.find(keys_of(ids))
        return bool(places[0] >= 0) and snapshot.ids_at(places) == ids

    def keys(self, ids: Ids) -> Array:
        """Return the keys of ids, uint64 [n], for `read`: hashing is most of the time of `get`."""
        return keys_of(encode_ids(several(ids)))

    def get(
        self,
        ids: Ids,
        *,
        dtype: torch.dtype | None = torch.float32,
        encoder: str | None = None,
    ) -> Tensor:
        """Return the vectors of ids, [n, T_s, W].

        Args:
            ids: texts or whole numbers; one alone is as a list of one.
            dtype: of the result; None: that of the files.
            encoder: what made the vectors that this call takes, where the store was opened for any.

        Raises:
            StoreError: an id that is not there, or whose vectors are from another encoder.
        """
        encoded = encode_ids(several(ids))
        snapshot = self._snapshot
        places = self._places(snapshot, keys_of(encoded), encoded, encoder)
        if len(places) and not snapshot.has_ids(places, encoded):
            pairs = zip(snapshot.ids_at(places), encoded, strict=True)
            raise self._unknown([asked for found, asked in pairs if found != asked])
        return snapshot.vectors_at(places, self._result_dtype(dtype))

    def __getitem__(self, ids: Ids) -> Tensor:
        """Return the vectors of one id, [T_s, W], or of several, [n, T_s, W], in float32."""
        if isinstance(ids, str) or _is_one(ids):
            return self._get_one(ids)
        return self.get(ids)

    def _get_one(self, one: object) -> Tensor:
        """Return the vectors of one id, [T_s, W]: `get` without the cost of arrays of one."""
        snapshot, ids = self._snapshot, encode_ids((one,))
        place = snapshot.find_one(keys_of(ids)[0])
        if place < 0 or snapshot.wrong:
            return self.get([one])[0]  # which says what is wrong
        shard, row = snapshot.one_at(place)
        if shard.id_at(row) != ids[0]:
            raise self._unknown(ids)
        return snapshot.take(shard, row, torch.float32)

    def read(self, keys: Array, *, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Return the vectors of keys that `keys` made, [n, T_s, W].

        The ids themselves are not compared: a key that another store made of an id that is not
        here is taken for unknown, but for one chance in 2^64 / entries.

        Raises:
            StoreError: see `get`; or these are no keys.
        """
        wanted = np.asarray(keys)
        if wanted.ndim != 1 or (wanted.dtype != np.uint64 and len(wanted)):
            raise StoreError(
                f"keys are {wanted.dtype} {list(wanted.shape)}: expected uint64 [n], as "
                "Store.keys makes them"
            )
        snapshot = self._snapshot
        return snapshot.vectors_at(self._places(snapshot, wanted, None), self._result_dtype(dtype))

    def _places(
        self,
        snapshot: Snapshot,
        keys: Array,
        ids: Sequence[bytes] | None,
        encoder: str | None = None,
    ) -> Array:
        """Return the places of keys, all of which are there and fresh."""
        places = snapshot.find(keys)
        if len(places) and int(places.min()) < 0:
            missing = np.flatnonzero(places < 0).tolist()
            raise self._unknown(
                [f"key {keys[at]}".encode() if ids is None else ids[at] for at in missing]
            )
        wrong = snapshot.wrong if encoder is None else self._wrong_stamps(snapshot, encoder)
        if wrong:
            stamps = snapshot.stamp_of(places)
            stale = np.flatnonzero(np.isin(stamps, list(wrong)))
            if len(stale):
                first = snapshot.ids_at(places[stale[:1]])[0].decode("utf-8", "replace")
                found = snapshot.manifest.stamps[int(stamps[stale[0]])]
                more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
                raise self._stale(found, f"id {shown(first)}{more}", encoder)
        return places

    def _unknown(self, missing: Sequence[bytes]) -> StoreError:
        if not len(self):
            return StoreError(f"{self.path} has no entries: add some with StoreWriter")
        names = ", ".join(shown(one.decode("utf-8", "replace")) for one in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return StoreError(
            f"{self.path} has no entry for {names}{more} (it has {len(self)} entries): add them, "
            "or reload the store if they were added after it was opened"
        )

    def _stale(self, found: Stamp, what: str, encoder: str | None = None) -> StoreError:
        wanted = next(
            (one for one in (self.encoder, encoder) if one not in (None, found.encoder)), None
        )
        kind = "projector" if wanted is None else "encoder"
        expected, got = wanted or self.projector, getattr(found, kind)
        return StoreError(
            f"{self.path}: {what} was made by another {kind}: expected {shown(expected)}, found "
            f"{shown(got)}; encode the items again, or open the store with the {kind} that made it"
        )

    def _result_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype is None and self.dtype != "int8":
            return TORCH_DTYPES[self.dtype]
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise StoreError(
                f"vectors as {dtype} are asked for: expected torch.float32, float16 or bfloat16 "
                f"(the store is {self.dtype}, and codes of int8 mean nothing without their scales)"
            )
        return dtype

    def ids(self) -> list[str]:
        """Return the ids of all entries, in the order in which they were written."""
        snapshot, found = self._snapshot, list[str]()
        places = snapshot.live()
        for start in range(0, len(places), _PIECE):
            found += [one.decode() for one in snapshot.ids_at(places[start : start + _PIECE])]
        return found

    def hashes(self, ids: Ids) -> list[str | None]:
        """Return the text hashes of ids; None where nobody gave a text.

        Raises:
            StoreError: an id that is not there.
        """
        encoded, snapshot = encode_ids(several(ids)), self._snapshot
        places = snapshot.find(keys_of(encoded))
        if len(places) and int(places.min()) < 0:
            raise self._unknown([encoded[at] for at in np.flatnonzero(places < 0).tolist()])
        raw = snapshot.hashes_at(places)
        return [one.tobytes().hex() if one.any() else None for one in raw]

    def needed(
        self,
        ids: Ids,
        texts: Iterable[object] | None = None,
        *,
        hashes: Iterable[str] | None = None,
    ) -> list[int]:
        """Return which of the ids have to be encoded, by their numbers in the list.

        Those that are not there, whose text is another one, or which were made by another encoder
        or projector than the store was opened with.

        Raises:
            StoreError: another number of texts than of ids.
        """
        encoded = encode_ids(several(ids))
        wanted = hashes_of(texts, hashes, len(encoded))
        snapshot = self._snapshot
        fresh = unchanged(snapshot, keys_of(encoded), wanted, snapshot.wrong)
        return np.flatnonzero(~fresh).tolist()

    def verify(self) -> None:
        """Read every file once and compare it with the digest that was written.

        Raises:
            StoreError: a file is not what was written.
        """
        manifest = self._snapshot.manifest
        for record in (*manifest.shards, *manifest.indexes):
            check_digest(self.path, record)

    def check_encoder(self, encoder: str) -> None:
        """Refuse a store that has entries, and none of this encoder.

        Raises:
            StoreError: so it is; the message names both encoders.
        """
        stamps = self._snapshot.manifest.stamps
        if len(self) and all(stamp.encoder != encoder for stamp in stamps):
            raise self._stale(stamps[0], "every entry", encoder)

    def stamps(self) -> list[Stamp]:
        """Return what made the entries that are there; replaced and deleted ones do not count."""
        snapshot = self._snapshot
        numbers = np.unique(snapshot.stamp_of(snapshot.live())).tolist()
        return [snapshot.manifest.stamps[number] for number in numbers]

    def info(self) -> StoreInfo:
        """Return what the store is."""
        manifest = self._snapshot.manifest
        rows = dict.fromkeys(manifest.stamps, 0)
        for shard in manifest.shards:
            rows[manifest.stamps[shard.stamp]] += shard.rows
        return StoreInfo(
            path=self.path,
            entries=manifest.entries,
            width=manifest.width,
            tokens=manifest.tokens,
            dtype=manifest.dtype,
            stamps=rows,
            shards=len(manifest.shards),
            dead=manifest.rows - manifest.entries,
            bytes=sum(record.bytes for record in (*manifest.shards, *manifest.indexes)),
        )


def _reopen(path: Path, encoder: str | None, projector: str | None) -> Store:
    return Store(path, encoder=encoder, projector=projector)


def _is_one(ids: Ids) -> bool:
    return isinstance(ids, str) or (hasattr(ids, "__index__") and not hasattr(ids, "__len__"))


def several(ids: Ids) -> Iterable[object]:
    """Return ids as a list, one alone too.

    Raises:
        StoreError: no ids.
    """
    if _is_one(ids):
        return [ids]
    if type(ids) is list:
        return ids
    if isinstance(ids, Tensor | np.ndarray):
        return ids.tolist()  # numbers of Python, which are quicker to read
    if not isinstance(ids, Iterable) or isinstance(ids, bytes | Mapping):
        raise StoreError(f"ids are {shown(ids)}: expected a list of texts or whole numbers")
    return ids
