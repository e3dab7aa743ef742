"""A .bin or .pt file of torch.save, read without running any code that it may contain."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lapilli.checkpoint.formats.files import first_bytes
from lapilli.checkpoint.formats.safetensors import DTYPES, MOST_DIMENSIONS
from lapilli.config.reader import shown
from lapilli.errors import CheckpointError, UnsafeFileError


class PickledShard:
    """One file of named tensors, memory-mapped where its format allows.

    Raises:
        UnsafeFileError: the pickle names anything but tensors and plain containers.
        CheckpointError: the file is truncated, or holds something else than named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _named_tensors(path, _load(path))

    def infos(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor."""
        return {name: (tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, mapped: bool = True) -> Tensor:
        """Return a tensor on the CPU: a view of the file when no other dtype is asked for."""
        return self._tensors[name].to(dtype or self._tensors[name].dtype, copy=not mapped)


def _load(path: Path) -> object:
    _check_archive(path)
    try:
        return _unpickled(path, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise _damaged(path) from error
    # Files of torch before 1.6 are no archives and cannot be mapped.
    try:
        return _unpickled(path, mmap=False)
    except RuntimeError as error:
        raise _damaged(path) from error


def _unpickled(path: Path, *, mmap: bool) -> object:
    """Load a file with the restricted unpickler; a RuntimeError is left to the caller."""
    try:
        with warnings.catch_warnings():  # of storages that only old files have
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(path, error) from error
    except RuntimeError:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise anything
        raise _damaged(path) from error


def _check_archive(path: Path) -> None:
    """Check that an archive holds its members as torch.save does: as they are, each once.

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


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is truncated or no weight file of torch: "
        "download it again"
    )


def _unsafe_or_damaged(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Tell a call to code from damage by the sentence about a global or an instruction."""
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
