"""Attention over a cache: one new position a row or many, and how new positions come into blocks.

    decode_attention     one query per row over blocks of keys and values, rows of any length
    prefill_attention    the last T of S positions; causal, or everything sees everything
    store_positions      new keys and values copied into their places

    keys, values   [N, K, P, A]   N blocks of P positions; float32, bfloat16, or int8 with scales
    block_table    [B, blocks]    where the positions of a row lie
    lengths        [B]            how many a row has; what lies beyond is not read

A contiguous cache [B, K, S, A] is B blocks of S positions with the table arange(B)[:, None].
Several new positions of one row are several rows with the same table and growing lengths. For a
prefill torch computes every score under a mask that it reads from memory; here what a query does
not see is never computed. Keys of a head are packed once for all queries that share them.

Both kinds of attention are custom ops too, each with a fake that computes its shape: a compiler
cannot look into a compiled library. While torch compiles, both call their ops, because their
references are slow. No gradients. Knows blocks; must not know sequences.
"""

import ctypes
from typing import Any

import torch

from lapilli.errors import ShapeMismatchError
from lapilli.kernels.library import (
    KINDS,
    AttentionCall,
    Library,
    PrefillCall,
    StoreCall,
    address,
    native,
)
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
    given = (q, keys, values, block_table, lengths)
    how: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "slopes": slopes,
        "softcap": softcap,
        "key_scales": key_scales,
        "value_scales": value_scales,
    }
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.lapilli.decode_attention(*given, **how)
        return found
    library = native()
    if library is not None and decodes_natively(q, keys, values):
        return attention_native(library, *given, **how)
    return attention_reference(*given, **how)


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
        key_scales=address(key_scales),
        value_scales=address(value_scales),
        table=block_table.data_ptr(),
        lengths=lengths.data_ptr(),
        slopes=address(slopes),
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


_DTYPES = (torch.float32, torch.bfloat16)


def prefill_reference(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B K S A"],
    v: Float[Tensor, "B K S A"],
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes: Float[Tensor, " Q"] | None = None,
    causal: bool = True,
) -> Float[Tensor, "B Q T A"]:
    """Compute the same as `prefill_attention` in plain torch, by its formula."""
    group, queries, positions = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        at = torch.arange(positions, device=q.device)
        distance = at[positions - queries :, None] - at  # [T, S]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def prefills_natively(*tensors: Tensor) -> bool:
    """Return whether the library can read these queries, keys and values."""
    needs_gradient = torch.is_grad_enabled()
    for x in tensors:
        fits = x.dtype in _DTYPES and x.device.type == "cpu" and x.stride(-1) == 1
        if not fits or x.shape[-1] % WIDTH_STEP or (needs_gradient and x.requires_grad):
            return False
    return not torch.compiler.is_compiling() and native() is not None


def prefill_attention(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B K S A"],
    v: Float[Tensor, "B K S A"],
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes: Float[Tensor, " Q"] | None = None,
    causal: bool = True,
) -> Float[Tensor, "B Q T A"]:
    """Return the attention of the last T of S positions; positions of a head may lie anywhere.

    Runs on the compiled library where `prefills_natively`, else as the reference; bfloat16 is
    computed in float32, in half the time that torch takes. The result lies as [B, T, Q, A] in
    memory, so that joining the heads afterwards copies nothing.

    Args:
        q: queries, Q a multiple of K.
        k: keys.
        v: values.
        scale: factor on the scores, 1 / sqrt(A) when None.
        window: a query sees its own and the `window - 1` positions before it.
        slopes: per head, what every position of distance takes off the score (ALiBi).
        causal: a query sees nothing after itself; window and slopes count only then.
    """
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.lapilli.prefill_attention(q, k, v, scale, window, slopes, causal)
        return found
    library = native()
    if library is None or not prefills_natively(q, k, v):
        return prefill_reference(q, k, v, scale=scale, window=window, slopes=slopes, causal=causal)
    dtype = q.dtype
    q, k, v = q.float(), k.float(), v.float()
    batch, heads, queries, width = q.shape
    slopes = slopes.float().contiguous() if slopes is not None and causal else None
    out = torch.empty((batch, queries, heads, width), dtype=torch.float32).transpose(1, 2)
    strides = {
        f"{name}_{axis}": x.stride(i)
        for name, x in (("q", q), ("k", k), ("v", v), ("out", out))
        for i, axis in enumerate(("row", "head", "position"))
    }
    call = PrefillCall(
        q=q.data_ptr(),
        keys=k.data_ptr(),
        values=v.data_ptr(),
        slopes=address(slopes),
        out=out.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        queries=queries,
        positions=k.shape[2],
        width=width,
        **strides,
        causal=int(causal),
        window=(window or 0) if causal else 0,
        threads=torch.get_num_threads(),
        scale=width**-0.5 if scale is None else scale,
    )
    library.functions.lapilli_prefill(ctypes.byref(call))
    return out.to(dtype)


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


@torch.library.custom_op("lapilli::decode_attention", mutates_args=())
def decode_attention_op(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float | None,
    window: int | None,
    slopes: Tensor | None,
    softcap: float | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    """Run `decode_attention` as an op."""
    return decode_attention(
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
    ).contiguous()


@decode_attention_op.register_fake
def _decode_attention_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("lapilli::prefill_attention", mutates_args=())
def prefill_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    slopes: Tensor | None,
    causal: bool,
) -> Tensor:
    """Run `prefill_attention` as an op; lies as [B, T, Q, A] in memory."""
    found = prefill_attention(q, k, v, scale=scale, window=window, slopes=slopes, causal=causal)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


@prefill_attention_op.register_fake
def _prefill_attention_fake(q: Tensor, *_: object) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)
