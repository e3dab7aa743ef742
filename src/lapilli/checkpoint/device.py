"""Where a model is put: device, number format, and the memory that is there for it."""

from pathlib import Path

import torch

from lapilli.config.reader import shown
from lapilli.errors import ConfigError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
AUTO = "auto"
MEMORY_SHARE = 0.8  # the rest is for activations, the KV cache and other programs
_BFLOAT16 = (8, 0)  # compute capability


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device; "auto" takes a CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):  # a number would be one of CUDA
        raise ConfigError(f"device must be a name such as cpu or cuda:1, got {shown(device)}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown: try auto, cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r} was asked for, but there is no CUDA device")
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # a build of torch without it asserts
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return found


def choose_dtype(
    dtype: str | torch.dtype, *, device: torch.device, stored: str | None, num_parameters: int
) -> torch.dtype:
    """Return the dtype of the weights.

    "auto" on a CPU is float32 where the weights fit into the free memory, else bfloat16: CPUs
    compute float32 several times as fast unless they have instructions for 16 bits. On CUDA it is
    bfloat16 from compute capability 8.0 on. Elsewhere it is the dtype of the checkpoint, else
    float16, which the original always takes.

    Raises:
        ConfigError: no dtype for weights.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise ConfigError(
                f"dtype {dtype} is not one for weights: choose from {', '.join(DTYPES)}"
            )
        return dtype
    if not isinstance(dtype, str):
        raise ConfigError(f"dtype must be a name such as float32, got {shown(dtype)}")
    if dtype != AUTO:
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown: choose from auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _BFLOAT16:
        return torch.bfloat16
    if device.type != "cpu":
        return DTYPES.get(stored or "", torch.float16)
    free = available_memory()
    fits = free is None or num_parameters * 4 <= MEMORY_SHARE * free
    return torch.float32 if fits else torch.bfloat16


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated, or None where the system does not say.

    Linux only: the kernel's MemAvailable, or less where the limit of the container leaves less.
    """
    known = [_meminfo(root / "proc/meminfo"), _container(root / "sys/fs/cgroup")]
    return min((free for free in known if free is not None), default=None)


def _meminfo(path: Path) -> int | None:
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container(path: Path) -> int | None:
    limit, used = path / "memory.max", path / "memory.current"
    if not limit.is_file() or not used.is_file():
        return None
    text = limit.read_text().strip()
    return int(text) - int(used.read_text()) if text.isdigit() else None
