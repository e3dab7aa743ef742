"""Memory of an engine: how much for keys and values, in which blocks, and what goes back."""

import ctypes
import os
import sys
from functools import cache
from typing import Any

import torch

from lapilli.errors import GenerationError
from lapilli.generate.engine.block_pool import BlockPool
from lapilli.generate.engine.options import MIB, EngineOptions
from lapilli.model.vlm import VisionLanguageModel
from lapilli.nn.block_store import BlockStore, QuantizedBlockStore
from lapilli.quant.linear import QuantLinear
from lapilli.shapes import Tensor


def new_pool(
    model: VisionLanguageModel, options: EngineOptions, *, context_length: int, like: Tensor
) -> BlockPool:
    """The blocks of an engine.

    Args:
        model: whose keys and values they hold.
        options: how much, and how.
        context_length: positions of the longest conversation.
        like: a tensor of the dtype and on the device of the hidden states.

    Raises:
        GenerationError: `kv_bytes` does not hold two blocks.
    """
    config, device = model.language_model.config, like.device
    dtype = kept_dtype(model, options, like)
    kind = QuantizedBlockStore if dtype == torch.int8 else BlockStore
    size = options.block_size
    per_block = kind.bytes_per_block(config, size, dtype)
    budget, idle_bytes = options.kv_bytes, options.prefix_bytes
    if budget is None:
        one = -(-context_length // size) * per_block
        memory = total_memory(device)
        budget = max(one, min(options.max_rows * one, memory // 4))
        idle_bytes = memory // 8 if idle_bytes is None else idle_bytes
    num_blocks = budget // per_block
    if num_blocks < 1:
        raise GenerationError(
            f"kv_bytes {budget} is less than one block of {size} positions takes in this model "
            f"({per_block}): give it at least {per_block / MIB:.1f} MiB per {size} positions"
        )
    idle = None if idle_bytes is None else idle_bytes // per_block
    store = kind(
        config,
        num_blocks + 1,
        block_size=size,
        dtype=like.dtype,
        kept_dtype=dtype,
        device=device,
    )
    return BlockPool(store, max_idle=idle)


def kept_dtype(model: VisionLanguageModel, options: EngineOptions, like: Tensor) -> torch.dtype:
    """In which format keys and values are kept.

    Where weights are rounded to 8 or 4 bits, bfloat16 keys and values change nothing that could be
    seen beside it, and a token of a 7B model reads a third of a gigabyte less.
    """
    if options.kv_dtype == "int8":
        return torch.int8
    is_packed = any(isinstance(one, QuantLinear) for one in model.modules())
    rounds = options.kv_dtype == "auto" and is_packed and like.device.type == "cpu"
    return torch.bfloat16 if rounds or options.kv_dtype == "bfloat16" else like.dtype


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine; 8 GiB where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 8192 * MIB


def give_back() -> None:
    """Memory that a picture or a long prompt took for a moment, back to the system.

    glibc keeps what was freed, up to a fifth of a gigabyte after a prompt of a 7B model.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:  # noqa: ANN401  a foreign function
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
