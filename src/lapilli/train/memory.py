"""How much memory a process has had at most; knows no training."""

import resource
import sys

import torch

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
