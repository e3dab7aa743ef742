"""A .bin or .pt file of torch.save, read without running any code that it may contain."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
        """Shape and dtype of every tensor."""
        return {name: (tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None, *, mapped: bool = True) -> Tensor:
        """A tensor on the CPU: a view of the file when no other dtype is asked for."""
        return self._tensors[name].to(dtype or self._tensors[name].dtype, copy=not mapped)


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(path, error) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        if "mmap can only be used" not in str(error):
            raise _damaged(path) from error
    # Files of torch before 1.6 are no archives and cannot be mapped.
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(path, error) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is truncated or no weight file of torch: "
        "download it again"
    )


def _unsafe_or_damaged(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Torch wraps both; its sentence about a global or an instruction tells a call to code."""
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
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor: this is no file "
                "of weights alone"
            )
        tensors[str(name)] = value.detach()
    return tensors
