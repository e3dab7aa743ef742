"""A .safetensors file: its header, and tensors as views of the mapped file or converted copies."""

import math
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast

import torch
from torch import Tensor

from lapilli.checkpoint.formats.files import first_bytes
from lapilli.config.json_text import MOST_BYTES, parse_json
from lapilli.config.reader import is_object, shown
from lapilli.errors import CheckpointError

DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
MOST_DIMENSIONS = 8


class SafetensorsShard:
    """One file, whose header is read at once and whose tensors are read when asked for.

    Raises:
        CheckpointError: the file is truncated or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._infos: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        start, header = self._header()
        size = path.stat().st_size
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, dtype, begin, end = self._entry(name, entry)
            if start + end > size:
                raise CheckpointError(
                    f"{path} is truncated: {shown(name)} ends at byte {start + end}, "
                    f"the file has {size} bytes; download it again"
                )
            self._infos[name] = (shape, dtype)
            self._places[name] = (start + begin, end - begin)
        self._check_overlaps()

    def infos(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor."""
        return self._infos

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, mapped: bool = True) -> Tensor:
        """Return a tensor on the CPU: a view of the mapped file when no other dtype is asked for.

        With mapped=False it is always a copy, for tensors that are not kept: pages of a mapping
        count as memory in use as long as the file is mapped.
        A conversion reads the bytes instead of mapping them, so that the memory in use is the
        converted weights and one tensor, not both forms of the whole file.
        """
        shape, stored = self._infos[name]
        offset, length = self._places[name]
        if mapped and dtype in (None, stored) and length:
            start, rest = divmod(offset, stored.itemsize)
            if not rest:
                strides = torch.empty(shape, device="meta").stride()
                return torch.empty(0, dtype=stored).set_(self._mapping, start, shape, strides)
        return self._read(offset, length).view(stored).view(shape).to(dtype or stored, copy=True)

    def _read(self, offset: int, length: int) -> Tensor:
        """Read bytes of the file into a buffer that the next call overwrites."""
        if len(self._buffer) < length:
            self._buffer = torch.empty(length, dtype=torch.uint8)
        part = self._buffer[:length]
        with self.path.open("rb") as file:
            file.seek(offset)
            file.readinto(part.numpy().data)
        return part

    @cached_property
    def _mapping(self) -> torch.UntypedStorage:
        """Map the file privately: its pages are shared until somebody writes to them."""
        size = self.path.stat().st_size
        mapping = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=size)
        return cast("torch.UntypedStorage", mapping)

    def _header(self) -> tuple[int, Mapping[str, object]]:
        prefix = first_bytes(self.path, 8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MOST_BYTES + 1
        text = first_bytes(self.path, 8 + length)[8:] if length <= MOST_BYTES else b""
        if len(text) != length:
            raise self._damaged()
        try:
            header = parse_json(text, f"the header of {self.path}", unique=True)
        except CheckpointError as error:
            raise self._damaged(str(error)) from error
        if not is_object(header):
            raise self._damaged()
        return 8 + length, header

    def _entry(self, name: str, entry: object) -> tuple[tuple[int, ...], torch.dtype, int, int]:
        if not is_object(entry):
            raise self._damaged()
        kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"shape or data_offsets of {shown(name)} are no list of sizes")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise CheckpointError(f"{self.path}: {shown(name)} has the unknown dtype {shown(kind)}")
        dtype = DTYPES[kind]
        begin, end = offsets
        # Sizes of 0 do not hide what a stride would overflow with.
        fits = len(shape) <= MOST_DIMENSIONS and math.prod(size or 1 for size in shape) < 1 << 60
        if not fits or end - begin != math.prod(shape) * dtype.itemsize:
            raise self._damaged(f"data_offsets of {shown(name)} are not those of its shape")
        return tuple(shape), dtype, begin, end

    def _check_overlaps(self) -> None:
        end, before = 0, ""
        for name, (begin, length) in sorted(self._places.items(), key=lambda item: item[1]):
            if length and begin < end:
                raise self._damaged(f"{shown(name)} lies over {shown(before)}")
            end, before = max(end, begin + length), name

    def _damaged(self, why: str = "") -> CheckpointError:
        size = self.path.stat().st_size
        return CheckpointError(
            f"{self.path} ({size} bytes) is truncated or no safetensors file"
            f"{f' ({why})' if why else ''}: download it again"
        )


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
