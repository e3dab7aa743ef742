"""How much memory an engine takes for keys and values, and the blocks it makes of it."""

import os

import torch

from lapilli.config.model import TextConfig
from lapilli.errors import GenerationError
from lapilli.generate.cache.blocks import BlockPool
from lapilli.generate.engine.options import MIB, EngineOptions
from lapilli.nn.block_store import BlockStore, QuantizedBlockStore


def new_pool(
    config: TextConfig,
    options: EngineOptions,
    *,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> BlockPool:
    """The blocks of an engine.

    Raises:
        GenerationError: `kv_bytes` does not hold two blocks.
    """
    kind = QuantizedBlockStore if options.kv_dtype == "int8" else BlockStore
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
    store = kind(config, num_blocks + 1, block_size=size, dtype=dtype, device=device)
    return BlockPool(store, max_idle=idle)


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine; 8 GiB where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 8192 * MIB
