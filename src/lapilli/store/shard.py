"""Files of a store: named arrays in a safetensors file, written once, mapped by many.

    vectors      [n, T_s, W]  in the number format of the store
    scales       [n, T_s]     float32, with int8 alone: vector = codes * scale
    id_bounds    [n + 1]      int64: the id of row r is ids[id_bounds[r] : id_bounds[r + 1]]
    ids          [bytes]      the ids in UTF-8, one after the other
    text_hashes  [n, 16]      bytes; all zero where nobody gave a text
    keys, places [n], samples of an index, see index.py

Nothing is unpickled: a header in JSON and raw little-endian numbers. Source: the safetensors
format, version 1.
"""

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lapilli.errors import StoreError
from lapilli.shapes import Float, Tensor
from lapilli.store.manifest import FileRecord, Manifest, ShardRecord, new_name

Array = npt.NDArray[Any]

HASH_BYTES: Final = 16
TORCH_DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
# bfloat16 is kept in numpy as its bits, which numpy has no numbers for.
_NUMPY_OF: Final = {
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "I8": "i1",
    "U8": "u1",
    "I64": "<i8",
    "U64": "<u8",
}
_NAMES: Final = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}
_PREFIX: Final = struct.Struct("<Q")
_LINE: Final = 64
_PIECE: Final = 1 << 24


def write_arrays(folder: Path, kind: str, arrays: Mapping[str, tuple[str, Array]]) -> FileRecord:
    """Write arrays to a new file and flush it.

    Args:
        folder: of the store.
        kind: `shard` or `index`.
        arrays: by name, dtype of the format and numbers; the first axis is that of the entries,
            but for `ids`. Wider dtypes come first, so that each is aligned.

    Raises:
        OSError: the disk does not take it; the file is removed.
    """
    header, end = dict[str, Any](), 0
    for name, (dtype, array) in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % _LINE)
    path = folder / new_name(kind)
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("xb") as file:
            for raw in (_PREFIX.pack(len(text)), text, *map(_raw, arrays.values())):
                for start in range(0, len(raw), _PIECE):
                    digest.update(raw[start : start + _PIECE])
                    size += file.write(raw[start : start + _PIECE])
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    rows = len(next(iter(arrays.values()))[1])
    return FileRecord(file=path.name, rows=rows, bytes=size, digest=digest.hexdigest())


def _raw(array: tuple[str, Array]) -> memoryview | bytes:
    """Return the bytes of an array."""
    numbers = np.ascontiguousarray(array[1])
    return memoryview(numbers.view("u1").reshape(-1)) if numbers.size else b""  # type: ignore[arg-type]  # an array has a buffer


class MappedArrays(NamedTuple):
    """A mapped file: its arrays, and at which byte each begins."""

    file: mmap.mmap
    arrays: dict[str, Array]
    begins: dict[str, int]


def map_arrays(
    folder: Path, record: FileRecord, expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> MappedArrays:
    """Map the arrays of a file, without reading them.

    Args:
        folder: of the store.
        record: the file.
        expected: by name, dtype of the format and shape; -1 is any number.

    Raises:
        FileNotFoundError: the file is gone: a compaction has replaced it, or somebody removed it.
        StoreError: another size or other arrays than the manifest says.
    """
    path = folder / record.file
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:
                raise damaged(path, f"it has {size} bytes, expected {record.bytes}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _cut(mapped, expected)
    except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise damaged(path, f"its header does not fit ({error!r:.100})") from error


def _cut(mapped: mmap.mmap, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> MappedArrays:
    (length,) = _PREFIX.unpack(mapped[: _PREFIX.size])
    begin = _PREFIX.size + length
    if begin > len(mapped):
        raise ValueError("it is longer than the file")
    header = json.loads(mapped[_PREFIX.size : begin])
    arrays, begins = dict[str, Array](), dict[str, int]()
    for name, (dtype, shape) in expected.items():
        entry, found = header[name], tuple(header[name]["shape"])
        fits = len(found) == len(shape) and all(
            want in (-1, got) and type(got) is int and got >= 0
            for want, got in zip(shape, found, strict=True)
        )
        if entry["dtype"] != dtype or not fits:
            raise ValueError(f"{name} is {entry['dtype']} {found}")
        start, stop = entry["data_offsets"]
        kind, count = np.dtype(_NUMPY_OF[dtype]), math.prod(found)
        if not 0 <= start <= stop <= len(mapped) - begin or stop - start != count * kind.itemsize:
            raise ValueError(f"{name} lies at {start}..{stop}")
        begins[name] = begin + start
        arrays[name] = np.frombuffer(mapped, kind, count, begins[name]).reshape(found)
    return MappedArrays(mapped, arrays, begins)


def check_digest(folder: Path, record: FileRecord) -> None:
    """Read a whole file and compare its SHA-256 with the manifest's.

    Raises:
        StoreError: they differ.
    """
    path = folder / record.file
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    if found != record.digest:
        raise damaged(path, f"its SHA-256 is {found[:16]}..., expected {record.digest[:16]}...")


def damaged(path: Path, why: str) -> StoreError:
    """Return the error of a file that is not what was written."""
    return StoreError(f"{path} is damaged: {why}; restore it from a copy, or build the store again")


class Shard:
    """Entries by row, mapped; nothing is read before it is asked for."""

    def __init__(self, folder: Path, record: FileRecord, manifest: Manifest) -> None:
        rows, tokens, width = record.rows, manifest.tokens, manifest.width
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "vectors": (_NAMES[manifest.dtype], (rows, tokens, width)),
            "id_bounds": ("I64", (rows + 1,)),
            "ids": ("U8", (-1,)),
            "text_hashes": ("U8", (rows, HASH_BYTES)),
        }
        if manifest.dtype == "int8":
            expected["scales"] = ("F32", (rows, tokens))
        self._file, arrays, begins = map_arrays(folder, record, expected)
        self.path = folder / record.file
        self.rows = rows
        self.vectors: Array = arrays["vectors"].reshape(rows, tokens * width)
        self.scales: Array | None = arrays.get("scales")
        self.hashes: Array = arrays["text_hashes"]
        self._bounds: Array = arrays["id_bounds"]
        self._ids: Array = arrays["ids"]
        self._begin = begins["ids"]  # a slice of the mapping is quicker than one of an array

    def ids_at(self, rows: Array) -> list[bytes]:
        """Return the ids of rows in UTF-8."""
        starts = (self._bounds.take(rows) + self._begin).tolist()
        stops = (self._bounds.take(rows + 1) + self._begin).tolist()
        mapped = self._file
        return [mapped[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def has_ids(self, rows: Array, ids: Sequence[bytes]) -> bool:
        """Return whether rows have these ids, in UTF-8: `ids_at(rows) == ids`, all at once."""
        starts = self._bounds.take(rows)
        lengths = self._bounds.take(rows + 1) - starts
        if not np.array_equal(lengths, np.fromiter(map(len, ids), np.int64, len(ids))):
            return False
        shifts = starts - (lengths.cumsum() - lengths)
        at = np.arange(int(lengths.sum())) + shifts.repeat(lengths)
        # Bounds of a damaged file may lead anywhere; what is there is another id.
        return not len(at) or (
            len(self._ids) > 0 and self._ids.take(at, mode="clip").tobytes() == b"".join(ids)
        )

    def id_at(self, row: int) -> bytes:
        """Return the id of a row in UTF-8."""
        start, stop = self._bounds[row : row + 2].tolist()
        return self._file[start + self._begin : stop + self._begin]


def _shard_arrays(
    dtype: str, vectors: Array, scales: Array | None, ids: Sequence[bytes], hashes: Array
) -> dict[str, tuple[str, Array]]:
    """Return the arrays of a file of entries, in an order that aligns each."""
    bounds = np.cumsum([0, *map(len, ids)], dtype="<i8")
    arrays: dict[str, tuple[str, Array]] = {"id_bounds": ("I64", bounds)}
    if scales is not None:
        arrays["scales"] = ("F32", scales)
    arrays["vectors"] = (_NAMES[dtype], vectors)
    arrays["text_hashes"] = ("U8", hashes)
    arrays["ids"] = ("U8", np.frombuffer(b"".join(ids), "u1"))
    return arrays


_LARGEST_CODE: Final = 127


def to_rows(vectors: Float[Tensor, "n T W"], dtype: str) -> tuple[Array, Array | None]:
    """Return vectors in the numbers of a file [n, T, W], and the scales [n, T] of int8.

    Raises:
        StoreError: a number that the format cannot say.
    """
    kind = torch.float32 if dtype == "int8" else TORCH_DTYPES[dtype]
    stored = vectors.to(kind, copy=True).contiguous()  # the caller may write over its own
    if not bool(torch.isfinite(stored).all()):
        raise StoreError(
            f"a vector has the number {float(vectors.abs().max()):g}, which is more than {dtype} "
            "can say: choose bfloat16 or float32"
        )
    if dtype == "int8":
        scales = stored.abs().amax(dim=-1) / _LARGEST_CODE
        smallest = torch.finfo(torch.float32).tiny  # of a vector of zeros
        codes = (stored / scales.clamp(min=smallest).unsqueeze(-1)).round()
        codes = codes.clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
        return codes.numpy(), scales.numpy()
    if dtype == "bfloat16":
        return stored.view(torch.int16).numpy().view("<u2"), None
    return stored.numpy(), None


class Rows:
    """Entries that wait to be written as a shard."""

    def __init__(self) -> None:
        self.vectors: list[Array] = []
        self.scales: list[Array] = []
        self.hashes: list[Array] = []
        self.ids: list[bytes] = []
        self.bytes = 0

    def append(self, raw: Array, scales: Array | None, hashes: Array, ids: Sequence[bytes]) -> None:
        """Add entries: vectors in the numbers of the file, scales of int8, hashes and ids."""
        self.vectors.append(raw)
        if scales is not None:
            self.scales.append(scales)
        self.hashes.append(hashes)
        self.ids += ids
        self.bytes += raw.nbytes

    def write(self, folder: Path, manifest: Manifest, stamp: int) -> ShardRecord:
        """Write them as a shard.

        Raises:
            OSError: the disk does not take it.
        """
        shape = (len(self.ids), manifest.tokens, manifest.width)
        scales = np.concatenate(self.scales) if self.scales else None
        vectors = np.concatenate(self.vectors).reshape(shape)
        arrays = _shard_arrays(
            manifest.dtype, vectors, scales, self.ids, np.concatenate(self.hashes)
        )
        record = write_arrays(folder, "shard", arrays)
        return ShardRecord(
            file=record.file,
            rows=len(self.ids),
            bytes=record.bytes,
            digest=record.digest,
            stamp=stamp,
        )
