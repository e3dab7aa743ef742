"""Decode attention: one new position per row over blocks of keys and values, rows of any length.

    keys, values   [N, K, P, A]   N blocks of P positions; float32, bfloat16, or int8 with scales
    block_table    [B, blocks]    where the positions of a row lie
    lengths        [B]            how many a row has; what lies beyond is not read

A contiguous cache [B, K, S, A] is B blocks of S positions with the table arange(B)[:, None].
Several new positions of one row are several rows with the same table and growing lengths.
"""

import ctypes

import torch

from lapilli.errors import ShapeMismatchError
from lapilli.kernels.library import KINDS, AttentionCall, Library, native
from lapilli.shapes import Float, Int, Tensor

WIDTH_STEP = 16
"""Head widths that the library reads are multiples of this."""


def attention_reference(
    q: Float[Tensor, "B Q A"],
    keys: Tensor,
    values: Tensor,
    block_table: Int[Tensor, "B blocks"],
    lengths: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes: Float[Tensor, " Q"] | None = None,
    softcap: float | None = None,
    key_scales: Float[Tensor, "N K P"] | None = None,
    value_scales: Float[Tensor, "N K P"] | None = None,
) -> Float[Tensor, "B Q A"]:
    """Compute the same as `decode_attention` in plain torch, in the dtype of q."""
    group = q.shape[1] // keys.shape[1]
    table = block_table.long()
    k, v = (
        _gather(cache, scales, table, q.dtype).repeat_interleave(group, dim=1)
        for cache, scales in ((keys, key_scales), (values, value_scales))
    )  # [B, Q, S, A]
    scores = torch.einsum("bqa,bqsa->bqs", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = lengths.long()[:, None] - 1 - torch.arange(k.shape[2], device=q.device)  # [B, S]
    if slopes is not None:
        scores = scores - slopes[None, :, None] * distance[:, None].to(scores.dtype)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    weights = torch.softmax(scores.masked_fill(~seen[:, None], float("-inf")), dim=-1)
    v = v.masked_fill(~seen[:, None, :, None], 0)  # 0 x NaN of memory that nobody wrote
    return torch.einsum("bqs,bqsa->bqa", weights, v)


def _gather(cache: Tensor, scales: Tensor | None, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the blocks of every row side by side, [B, K, S, A]."""
    x = cache.to(dtype) if scales is None else cache.to(dtype) * scales[..., None].to(dtype)
    x = x[table].transpose(1, 2)  # [B, K, blocks, P, A]
    return x.flatten(2, 3)


def decode_attention(
    q: Float[Tensor, "B Q A"],
    keys: Tensor,
    values: Tensor,
    block_table: Int[Tensor, "B blocks"],
    lengths: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes: Float[Tensor, " Q"] | None = None,
    softcap: float | None = None,
    key_scales: Float[Tensor, "N K P"] | None = None,
    value_scales: Float[Tensor, "N K P"] | None = None,
) -> Float[Tensor, "B Q A"]:
    """Return the attention of each row's query over the row's first `lengths` positions.

    Heads of a group share what is read of the cache. Runs on the compiled library for float32
    queries on a CPU whose heads are a multiple of 16 wide, else on torch. No gradients.

    Args:
        q: one query position per row, Q a multiple of K.
        keys: blocks [N, K, P, A].
        values: likewise.
        block_table: int32 for the library; enough blocks for every length.
        lengths: int32 for the library; at least 1 each.
        scale: factor on the scores, 1 / sqrt(A) when None.
        window: a query sees its own and the `window - 1` positions before it.
        slopes: per head, what every position of distance takes off the score (ALiBi).
        softcap: c, where a score s becomes c tanh(s / c) before anything else.
        key_scales: of int8 keys, by position and head.
        value_scales: of int8 values, likewise.
    """
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.lapilli.decode_attention(
            q,
            keys,
            values,
            block_table,
            lengths,
            scale,
            window,
            slopes,
            softcap,
            key_scales,
            value_scales,
        )
        return found
    library = native()
    if library is not None and decodes_natively(q, keys, values):
        return attention_native(
            library,
            q,
            keys,
            values,
            block_table,
            lengths,
            scale=scale,
            window=window,
            slopes=slopes,
            softcap=softcap,
            key_scales=key_scales,
            value_scales=value_scales,
        )
    return attention_reference(
        q,
        keys,
        values,
        block_table,
        lengths,
        scale=scale,
        window=window,
        slopes=slopes,
        softcap=softcap,
        key_scales=key_scales,
        value_scales=value_scales,
    )


def decodes_natively(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether `decode_attention` runs on the library; q ends in the width of a head."""
    return (
        q.dtype == torch.float32
        and q.device.type == "cpu"
        and keys.dtype in KINDS
        and q.shape[-1] % WIDTH_STEP == 0
        and keys.stride() == values.stride()
        and keys.stride()[2:] == (q.shape[-1], 1)
        and not (torch.is_grad_enabled() and q.requires_grad)
        and not torch.compiler.is_compiling()
        and native() is not None
    )


def attention_native(
    library: Library,
    q: Float[Tensor, "B Q A"],
    keys: Tensor,
    values: Tensor,
    block_table: Int[Tensor, "B blocks"],
    lengths: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes: Float[Tensor, " Q"] | None = None,
    softcap: float | None = None,
    key_scales: Float[Tensor, "N K P"] | None = None,
    value_scales: Float[Tensor, "N K P"] | None = None,
) -> Float[Tensor, "B Q A"]:
    """Compute `decode_attention` by the library.

    Raises:
        ShapeMismatchError: positions of a cache that do not lie side by side, keys and values
            that lie differently, or int8 without scales.
    """
    q, block_table, lengths = q.contiguous(), block_table.int().contiguous(), lengths.int()
    _check_caches(keys, values, key_scales, value_scales)
    slopes = None if slopes is None else slopes.float().contiguous()
    out = torch.empty_like(q)
    call = AttentionCall(
        q=q.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        key_scales=None if key_scales is None else key_scales.data_ptr(),
        value_scales=None if value_scales is None else value_scales.data_ptr(),
        table=block_table.data_ptr(),
        lengths=lengths.data_ptr(),
        slopes=None if slopes is None else slopes.data_ptr(),
        out=out.data_ptr(),
        rows=q.shape[0],
        heads=q.shape[1],
        kv_heads=keys.shape[1],
        block_size=keys.shape[2],
        width=q.shape[2],
        table_stride=block_table.shape[1],
        block_stride=keys.stride(0),
        head_stride=keys.stride(1),
        kind=KINDS[keys.dtype],
        window=window or 0,
        threads=torch.get_num_threads(),
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        softcap=softcap or 0.0,
    )
    library.functions.lapilli_attention(ctypes.byref(call))
    return out


def _check_caches(
    keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None
) -> None:
    width = keys.shape[3]
    if keys.stride() != values.stride() or keys.stride()[2:] != (width, 1):
        raise ShapeMismatchError(
            "keys and values must lie alike, the positions of a head side by side: found strides "
            f"{keys.stride()} and {values.stride()}"
        )
    for name, cache, scales in (("keys", keys, key_scales), ("values", values, value_scales)):
        if cache.dtype == torch.int8 and (scales is None or not scales.is_contiguous()):
            raise ShapeMismatchError(f"int8 {name} need contiguous scales [N, K, P]")
