"""Weight files: names, shapes and dtypes from the headers, tensors one by one, memory-mapped.

    SafetensorsShard   one .safetensors file: views of the mapped file, or converted copies
    PickledShard       one .bin or .pt file of torch.save, read with the restricted unpickler
    WeightStore        the tensors of several files by name

Knows file formats, no models.
"""

import ctypes
import math
import mmap
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast

import torch
from torch import Tensor

from lapilli.checkpoint.source import GGUF, first_bytes, has_file, read_optional_json
from lapilli.config.reader import MOST_BYTES, is_object, parse_json, shown, utf8_name
from lapilli.errors import CheckpointError, MissingFileError, UnsafeFileError

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
FINITE_BLOCK = 1 << 22  # elements that are checked for NaN and infinities together
LONGEST_NAME = 255  # of a file, on every file system that there is
LFS = b"version https://git-lfs"
# Index, single file and numbered shards, in the order in which they are looked for.
FULL_WEIGHTS = (
    ("model.safetensors.index.json", "model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def num_bytes(self) -> int:
        """Return the size in the file."""
        return self.num_parameters * self.dtype.itemsize

    @property
    def num_parameters(self) -> int:
        """Return the number of elements."""
        return torch.Size(self.shape).numel()


class SafetensorsShard:
    """One safetensors file; its header is read at once, its tensors on demand.

    Raises:
        CheckpointError: the file is truncated or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
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
            self.infos[name] = TensorInfo(shape, dtype, path.name)
            self._places[name] = (start + begin, end - begin)
        self._check_overlaps()

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, mapped: bool = True) -> Tensor:
        """Return a tensor on the CPU: a view of the mapped file if it has the dtype already.

        With mapped=False it is always a copy, for tensors that are not kept: pages of a mapping
        count as memory in use as long as the file is mapped. A conversion reads the bytes instead
        of mapping them, so that memory holds the converted weights and one tensor more.
        """
        shape, stored = self.infos[name].shape, self.infos[name].dtype
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
        with utf8_name(self.path) as name:
            mapping = torch.UntypedStorage.from_file(name, shared=False, nbytes=size)
        ask_for_large_pages(mapping.data_ptr(), size)
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
        # A size of 0 counts as 1: the strides must not overflow either.
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
        return _damaged(self.path, "safetensors file", why)


def ask_for_large_pages(start: int, size: int) -> None:
    """Ask for pages of 2 MiB under a mapping, where the operating system has them.

    Every token reads all weights once. In pages of 4 KiB a third of the time may go into finding
    them in memory, most of all inside a virtual machine. It is a wish: nothing depends on it.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and size:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def release_pages(tensor: Tensor, files: Sequence[Path]) -> None:
    """Give back the memory of a tensor that is a view of a mapped file and is not needed now.

    Who reads it again reads the file again. Nothing happens to a tensor whose storage is none of
    these files as a whole.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    sizes = {file.stat().st_size for file in files}
    if advice is None or tensor.untyped_storage().nbytes() not in sizes:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


class PickledShard:
    """One file of named tensors, memory-mapped where its format allows.

    Raises:
        UnsafeFileError: the pickle names anything but tensors and plain containers.
        CheckpointError: the file is truncated, or holds something else than named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_archive(path)
        self._tensors = _named_tensors(path, _load(path))
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype, path.name)
            for name, tensor in self._tensors.items()
        }

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, mapped: bool = True) -> Tensor:
        """Return a tensor on the CPU: a view of the file if it has the dtype already."""
        return self._tensors[name].to(dtype or self._tensors[name].dtype, copy=not mapped)


def _load(path: Path, *, mapped: bool = True) -> object:
    """Load a file with the restricted unpickler."""
    try:
        with warnings.catch_warnings(), utf8_name(path) as name:
            warnings.simplefilter("ignore")  # of storages in old files
            return torch.load(name, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(path, error) from error
    except Exception as error:  # damaged bytes make an unpickler raise anything
        if not mapped or "mmap can only be used" not in str(error):
            raise _damaged(path) from error
    # Files of torch before 1.6 are no archives and cannot be mapped.
    return _load(path, mapped=False)


def _check_archive(path: Path) -> None:
    """Check that an archive holds its members uncompressed and once each, as torch.save does.

    Raises:
        CheckpointError: members are compressed, or larger together than the file.
    """
    if first_bytes(path, 4) != b"PK\x03\x04":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _damaged(path) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path} is a compressed archive, which torch.save never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise _damaged(path)


def _damaged(path: Path, kind: str = "weight file of torch", why: str = "") -> CheckpointError:
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is truncated or no {kind}"
        f"{f' ({why})' if why else ''}: download it again"
    )


def _unsafe_or_damaged(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Return the error of a pickle with code, or of a damaged one, by torch's message."""
    text = str(error)
    marks = ("GLOBAL", "Unsupported class", "Unsupported operand", "Trying to call", "REDUCE")
    if not any(mark in text for mark in marks):
        return _damaged(path)
    named = next((line.strip() for line in text.splitlines() if "GLOBAL" in line), "")
    return UnsafeFileError(
        f"{path} is refused: it is a pickle that would run code when read"
        f"{f' ({named})' if named else ''}; get the weights as safetensors"
    )


def _named_tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected named tensors")
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {shown(name)} is a {type(value).__name__}, expected a tensor: this is no "
                "file of weights alone"
            )
        strange = _why_unfit(value)
        if strange:
            raise CheckpointError(
                f"{path}: {shown(name)} is {strange}, expected a plain tensor of numbers"
            )
        tensors[str(name)] = value.detach()
    return tensors


def _why_unfit(tensor: Tensor) -> str:
    """Return what makes a tensor unfit to be a weight, or an empty text."""
    marks = {
        "nested": tensor.is_nested,
        "quantized": tensor.is_quantized,
        "on the meta device (without values)": tensor.is_meta,
        f"sparse ({tensor.layout})": tensor.layout != torch.strided,
        f"of {tensor.dtype}": tensor.dtype not in DTYPES.values(),
        f"of {tensor.dim()} dimensions": tensor.dim() > MOST_DIMENSIONS,
    }
    found = next((mark for mark, is_so in marks.items() if is_so), "")
    if found:
        return found
    if tensor.is_conj() or tensor.is_neg():
        return "a view that is negated when it is read"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return f"of shape {tuple(tensor.shape)} and larger than what is stored of it"
    return ""


Shard = SafetensorsShard | PickledShard


@dataclass(slots=True)
class WeightStore:
    """The tensors of some weight files by name."""

    shards: dict[str, Shard] = field(default_factory=dict)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> "WeightStore":
        """Open the tensors of these files; a name may stand in one file only.

        Raises:
            MissingFileError: a file is not there.
            CheckpointError: a file is damaged, or two hold the same tensor.
        """
        store = cls()
        for path in paths:
            shard = open_shard(path)
            store.shards[path.name] = shard
            for name, info in shard.infos.items():
                if name in store.infos:
                    raise CheckpointError(
                        f"{name} stands in {store.infos[name].file} and in {path.name}"
                    )
                store.infos[name] = info
        return store

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, mapped: bool = True) -> Tensor:
        """Return a tensor on the CPU.

        It is converted to `dtype`, if one is given; with mapped=False it is always a copy, else it
        may be a view of the file.
        """
        shard = self.shards[self.infos[name].file]
        return shard.tensor(self.aliases.get(name, name), dtype, mapped=mapped)

    def rename(self, other: "WeightStore", foreign: str, name: str) -> None:
        """Add a tensor of another store under another name."""
        info = other.infos[foreign]
        self.shards[info.file] = other.shards[info.file]
        self.infos[name] = info
        self.aliases[name] = other.aliases.get(foreign, foreign)


def open_shard(path: Path) -> Shard:
    """Open a weight file by its ending.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is damaged, or a file of another kind under this name.
    """
    if not has_file(path):
        raise MissingFileError(f"{path.name} is missing in {path.parent}")
    beginning = first_bytes(path, len(LFS))
    if beginning.startswith(b"GGUF"):
        raise CheckpointError(f"{path} is {GGUF}")
    if beginning == LFS:
        raise CheckpointError(
            f"{path} is a Git LFS pointer without the weights: run `git lfs pull`"
        )
    return SafetensorsShard(path) if path.suffix == ".safetensors" else PickledShard(path)


def find_weight_files(directory: Path) -> tuple[Path, ...]:
    """Find the files that hold a model's weights; return none where there are none.

    Raises:
        MissingFileError: an index names a file that is not there.
        CheckpointError: an index without weight_map.
    """
    for index, single, pattern in FULL_WEIGHTS:
        found = read_optional_json(directory / index)
        if found is not None:
            return _indexed(directory, index, found.get("weight_map"))
        if has_file(directory / single):
            return (directory / single,)
        shards = tuple(sorted(directory.glob(pattern)))
        if shards:
            _check_numbered(directory, shards)
            return shards
    return ()


def complete_weights(directory: Path) -> tuple[Path, ...]:
    """Find the weight files of a directory; none where some are missing."""
    try:
        return find_weight_files(directory)
    except MissingFileError:
        return ()


def _indexed(directory: Path, index: str, weight_map: object) -> tuple[Path, ...]:
    if not is_object(weight_map):
        raise CheckpointError(f"{directory / index} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / index}: weight_map must map tensors to file names")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(
            f"{directory / index} names {shown(outside[0])}, outside its directory"
        )
    missing = [n for n in names if len(n) > LONGEST_NAME or not has_file(directory / n)]
    if missing:
        some = ", ".join(shown(name)[1:-1] for name in missing[:3])
        raise MissingFileError(
            f"{index} names {some}, missing in {directory} "
            f"({len(missing)} of {len(names)} weight files): download it again"
        )
    return tuple(directory / name for name in names)


def _check_numbered(directory: Path, shards: tuple[Path, ...]) -> None:
    count = shards[0].stem.rpartition("-of-")[2]
    if count.isdigit() and int(count) != len(shards):
        raise MissingFileError(
            f"{len(shards)} of {int(count)} weight files are in {directory}: download it again"
        )


def check_values(name: str, tensor: Tensor) -> None:
    """Check in one pass that no value is NaN or infinite, by the sum of all.

    The sum of finite values may overflow too; only then they are checked one by one, in blocks, so
    that no mask of the whole tensor is made.

    Raises:
        CheckpointError: there is one.
    """
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return
    blocks = torch.split(tensor.flatten(), FINITE_BLOCK)
    bad = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
    if bad:
        raise CheckpointError(
            f"{name} has {bad} values of {tensor.numel()} that are NaN or infinite: "
            "the checkpoint is damaged or its training diverged"
        )
