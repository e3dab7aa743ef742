"""New keys and values copied into the blocks of a cache, in one call.

Blocks of bfloat16 take float32 keys and values rounded to the nearest.
"""

import ctypes

import torch

from lapilli.kernels.library import KINDS, StoreCall, native
from lapilli.shapes import Float, Int, Tensor


def store_reference(
    keys: Float[Tensor, "N K P A"],
    values: Float[Tensor, "N K P A"],
    blocks: Int[Tensor, " T"],
    offsets: Int[Tensor, " T"],
    k: Float[Tensor, "T K A"],
    v: Float[Tensor, "T K A"],
) -> None:
    """Compute the same as `store_positions` in plain torch."""
    keys[blocks, :, offsets] = k.to(keys.dtype)
    values[blocks, :, offsets] = v.to(values.dtype)


def store_positions(
    keys: Float[Tensor, "N K P A"],
    values: Float[Tensor, "N K P A"],
    blocks: Int[Tensor, " T"],
    offsets: Int[Tensor, " T"],
    k: Float[Tensor, "T K A"],
    v: Float[Tensor, "T K A"],
) -> None:
    """Write position t of k and v into block `blocks[t]`, place `offsets[t]`.

    Args:
        keys: blocks of the cache, changed in place.
        values: likewise, lying as the keys do.
        blocks: of every position.
        offsets: inside the block.
        k: new keys; heads may lie anywhere.
        v: new values, likewise.
    """
    library = None if torch.compiler.is_compiling() else native()
    if library is None or not _fits(keys, values, blocks, offsets, k, v):
        store_reference(keys, values, blocks, offsets, k, v)
        return
    call = StoreCall(
        k=k.data_ptr(),
        v=v.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        blocks=blocks.data_ptr(),
        offsets=offsets.data_ptr(),
        positions=k.shape[0],
        heads=k.shape[1],
        width=k.shape[2],
        k_position=k.stride(0),
        k_head=k.stride(1),
        v_position=v.stride(0),
        v_head=v.stride(1),
        block_stride=keys.stride(0),
        head_stride=keys.stride(1),
        kind=KINDS[keys.dtype],
    )
    library.functions.lapilli_store(ctypes.byref(call))


def _fits(
    keys: Tensor, values: Tensor, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor
) -> bool:
    """Return whether the library can copy these."""
    return (
        k.dtype == v.dtype == torch.float32
        and keys.dtype == values.dtype
        and keys.dtype in (torch.float32, torch.bfloat16)
        and all(x.device.type == "cpu" for x in (keys, values, k, v))
        and blocks.dtype == offsets.dtype == torch.int64
        and blocks.is_contiguous()
        and offsets.is_contiguous()
        and keys.is_contiguous()
        and values.is_contiguous()
        and k.stride(-1) == v.stride(-1) == 1
        and not (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad))
    )
