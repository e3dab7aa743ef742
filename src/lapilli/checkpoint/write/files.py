"""Writing of checkpoint files; knows bytes and folders, no models.

new_directory(path)   a folder written aside, flushed, checked, and swapped with `path` in one
                      step: a kill at any moment leaves the old folder or the new one, never a
                      mixture; an empty mount point is filled, config.json last
write_weights(...)    tensor by tensor, so that no second copy of a model is ever in memory
"""

import ctypes
import errno
import io
import json
import os
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lapilli.checkpoint.formats.weights import DTYPES
from lapilli.checkpoint.keymaps import KeyMap
from lapilli.config.reader import shown
from lapilli.disk import FULL_DISK, advice_on, flush_path, take_lock
from lapilli.errors import CheckpointError, ConfigError

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOWER_FOLDER = "vision_tower"  # the only folder inside of a checkpoint
MARKS = {"config.json", "adapter_config.json"}  # of which every checkpoint has one

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LINE = 64  # bytes of a line of the cache
_PREFIX = struct.Struct("<Q")  # length of the header
_PIECE = 1 << 24  # elements of a tensor that are converted and written at once
_FILLING = ".lapilli.part"  # inside of a mount point
_MOUNTS = Path("/proc/self/mountinfo")
# Flags of renameat2: paths relative to the working directory, swap both names.
_AT_FDCWD, _EXCHANGE = -100, 2


@dataclass(frozen=True, slots=True)
class Deferred:
    """A tensor that is computed when it is written, and not kept."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()


Check = Callable[[Path], None]
"""What looks at written files before they take their place; what it raises prevents that."""
Stored = Tensor | Deferred
# Dtype of all floats, or of each tensor by its name; None: as they are.
Formats = torch.dtype | Mapping[str, torch.dtype] | None


@contextmanager
def new_directory(
    path: Path, *, overwrite: bool = False, check: Check | None = None
) -> Iterator[Path]:
    """Yield a folder beside `path` that replaces it once everything is on the disk.

    A half-written folder of an earlier process is removed first. Where `path` is a link, the folder
    that it leads to is replaced. An empty mount point, which cannot be renamed, is filled.

    Args:
        path: of the folder.
        overwrite: see `check_target`.
        check: called with the written folder before it takes its place.

    Raises:
        CheckpointError: see `check_target`, or the disk is full.
    """
    path = check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path / _FILLING if is_mount(path) else path.parent / f".{path.name}.part"
    _remove(aside)
    try:
        with explaining_full_disk(path):
            folder = aside / "new"
            folder.mkdir(parents=True)
            yield folder
            for written in (*folder.rglob("*"), folder):
                flush_path(written)
            if check is not None:
                check(folder)
            if aside.parent == path:
                _fill(folder, path)
            else:
                _move_into_place(folder, path)
    finally:
        _remove(aside)


def check_target(path: Path, *, overwrite: bool = False) -> Path:
    """Return the place of a folder that is going to be written, links followed.

    Args:
        path: of the folder; nothing, an empty folder or, with `overwrite`, a checkpoint.
        overwrite: replace what is there, if it is a checkpoint and nothing else: a folder may hold
            things that nobody meant, the source of this very checkpoint for one.

    Raises:
        CheckpointError: something else is there.
    """
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CheckpointError(f"{path} leads nowhere: {error}") from error
    if not os.path.lexists(place):
        _check_parent(path, place)
        return place
    if Path.cwd().is_relative_to(place):
        raise CheckpointError(
            f"{path} holds the working directory, which cannot be replaced: give another folder"
        )
    inside = {item.name: item.is_dir() for item in place.iterdir()} if place.is_dir() else None
    is_mounted = inside is not None and is_mount(place)
    if inside and is_mounted:
        inside.pop(_FILLING, None)
    if inside == {}:
        return place
    if not overwrite:
        raise CheckpointError(
            f"{path} is there already: choose another place, or overwrite it (--overwrite)"
        )
    if inside is None:
        raise CheckpointError(f"{path} is no folder: choose another place, or remove it first")
    if is_mounted:
        raise _is_mounted(path)
    folders = {name for name, is_folder in inside.items() if is_folder}
    foreign = sorted(folders - {TOWER_FOLDER})
    if foreign or not MARKS & set(inside):
        found = f"a folder {foreign[0]!r}" if foreign else f"no {' or '.join(sorted(MARKS))}"
        raise CheckpointError(
            f"{path} is not overwritten, as it is no checkpoint alone: there is {found} in it. "
            "Choose another place, or remove it first"
        )
    return place


def _check_parent(path: Path, place: Path) -> None:
    """Check that the folder of what is going to be written can be made, before any work.

    Raises:
        CheckpointError: a file is in its way, or nothing can be written there.
    """
    parent = next(one for one in place.parents if os.path.lexists(one))
    if not parent.is_dir():
        raise CheckpointError(f"{path}: Not a directory: {parent} is a file; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{path}: nothing can be written in {parent}; choose another place")


def _is_mounted(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a mount point, which cannot be replaced: give a folder inside of it"
    )


def is_mount(path: Path) -> bool:
    """Return whether something is mounted on a folder, one of the same disk (Linux) included."""
    if path.is_mount():
        return True
    try:
        table = _MOUNTS.read_bytes()
    except OSError:  # another system
        return False
    # Fifth field: where it is mounted; spaces and the like are octal, \\040. Source: proc(5).
    points = {
        line.split()[4].decode("unicode_escape").encode("latin-1") for line in table.splitlines()
    }
    return os.fsencode(path) in points


@contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Raise errors of a full disk with the path, the cause and what to do.

    Raises:
        CheckpointError: the disk is full, or a quota or limit on the size of files is reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        found = error.strerror or str(error)
        if error.errno == errno.ENOSPC:  # else the disk may be nearly empty
            found += f" ({shutil.disk_usage(path.parent).free} bytes are free on that disk)"
        raise CheckpointError(
            f"{path} could not be written: {found}; what was there before is untouched. "
            f"{advice_on(error)} and save again"
        ) from error


def write_weights(
    folder: Path,
    tensors: Mapping[str, Stored],
    keymap: KeyMap | None = None,
    *,
    dtype: Formats = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write model.safetensors, or numbered shards with an index, in the order of the tensors.

    The dtype is that of the stored floats, of all or by the names of `tensors`; None: each as it
    is. `keymap` gives their names in the files; None: the same names.

    Raises:
        CheckpointError: `keymap` has no name for a tensor.
    """
    if keymap is not None:
        if isinstance(dtype, Mapping):
            dtype = keymap.rename({name: dtype[name] for name in tensors if name in dtype})
        tensors = keymap.rename(tensors)
    shards: list[dict[str, Stored]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * _stored_as(name, tensor, dtype).itemsize
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes
        total += num_bytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], dtype=dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, dtype=dtype)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: Mapping[str, Stored], *, dtype: Formats = None) -> None:
    """Write one safetensors file; tensors are converted while they are written, piece by piece.

    Each tensor is aligned to its numbers, and to a line of the cache where its size is a multiple
    of one: those come first, then wider dtypes. The kernels read a mapped weight in lines, and one
    that begins in the middle of a line makes a token a quarter slower.

    Source: the safetensors format, version 1.
    """
    named = {name: (tensor, _stored_as(name, tensor, dtype)) for name, tensor in tensors.items()}
    sizes = {name: tensor.numel() * stored.itemsize for name, (tensor, stored) in named.items()}
    order = sorted(
        named, key=lambda name: (sizes[name] % _LINE != 0, -named[name][1].itemsize, name)
    )
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, stored = named[name]
        begin, end = end, end + sizes[name]
        header[name] = {
            "dtype": _NAMES[stored],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % _LINE)
    with path.open("wb") as file:
        file.write(_PREFIX.pack(len(text)) + text)
        for name in order:
            tensor, stored = named[name]
            for piece in torch.split(value(tensor).reshape(-1), _PIECE):
                raw = piece.to("cpu", stored).contiguous().view(torch.uint8)
                file.write(raw.numpy().data)


def _stored_as(name: str, tensor: Stored, dtype: Formats) -> torch.dtype:
    wanted = dtype.get(name) if isinstance(dtype, Mapping) else dtype
    return wanted if wanted is not None and tensor.dtype.is_floating_point else tensor.dtype


def value(tensor: Stored) -> Tensor:
    """Return the tensor, computed now if it was deferred."""
    return tensor.make() if isinstance(tensor, Deferred) else tensor.detach()


def common_dtypes(state: Mapping[str, Stored], dtype: Formats = None) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which the floats of a state are written, the most common first."""
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in state.items():
        if tensor.dtype.is_floating_point:
            counts[_stored_as(name, tensor, dtype)] += tensor.numel()
    return tuple(found for found, _ in counts.most_common()) or (torch.float32,)


def write_pickled(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write named tensors in the format of torch.save, as the original's small files are."""
    buffer = io.BytesIO()
    # Cloned: pickling a view writes its whole storage.
    torch.save({name: value(t).cpu().clone() for name, t in tensors.items()}, buffer)
    path.write_bytes(buffer.getbuffer())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a readable JSON file.

    Raises:
        CheckpointError: it would name a folder whose name is no UTF-8, which JSON cannot.
    """
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        text = error.object[: error.end].rpartition('"')[2]
        raise CheckpointError(
            f"{path.name} cannot name {shown(text)}..., as its name is no UTF-8: rename it first"
        ) from error
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in config.json."""
    return str(dtype).removeprefix("torch.")


def _move_into_place(folder: Path, path: Path) -> None:
    """Move `folder` to `path`, in one step where the system can swap names."""
    if path.exists():
        if not _exchange(folder, path):
            try:
                path.rename(folder.parent / "old")
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if any(path.iterdir()):
                    raise _is_mounted(path) from error
                _fill(folder, path)
            else:
                folder.rename(path)
    else:
        folder.rename(path)
    flush_path(path.parent)


def _fill(folder: Path, path: Path) -> None:
    """Move what is in `folder` into `path`, which is empty but for it; the marks come last.

    Killed in between, it is no checkpoint.
    """
    for item in sorted(folder.iterdir(), key=lambda item: (item.name in MARKS, item.name)):
        shutil.move(item, path / item.name)  # copies, where it is another disk
    for written in (*path.rglob("*"), path):
        flush_path(written)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names (Linux); return False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    done = call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE)
    return bool(done == 0)


@contextmanager
def locked_folder(folder: Path, refusal: str) -> Iterator[None]:
    """Make a folder this process's alone until the block ends, where the system can do that.

    Raises:
        ConfigError: another process has it; the message is `refusal`.
    """
    if sys.platform == "win32":  # which opens no folder
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        if not take_lock(number):
            raise ConfigError(refusal)
        yield
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
