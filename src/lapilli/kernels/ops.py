"""The operations of this room as torch custom ops, each with a fake that computes its shape.

    torch.ops.lapilli.decode_attention, prefill_attention, rms_norm, silu_mul, rotate   (and linear)

A compiler cannot look into a compiled library; an op stands there as one opaque step. While torch
compiles, the two kinds of attention call their ops, because their references are slow. The small
operations do not: written in plain torch the compiler fuses them with what is around them, which
an op would prevent (three layers of width 256 take 1.6 times as long with the ops, of width 1024
1.05 times). Their ops are for programs that trace without a compiler behind it.
"""

import torch
from torch import Tensor

from lapilli.kernels.attention import decode_attention
from lapilli.kernels.fused import rms_norm, rotate, silu_mul
from lapilli.kernels.prefill import prefill_attention


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
    """Run `attention.decode_attention` as an op."""
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
def _decode_attention_fake(
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
    del keys, values, block_table, lengths, scale, window, slopes, key_scales, value_scales
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
    """Run `prefill.prefill_attention` as an op; lies as [B, T, Q, A] in memory."""
    found = prefill_attention(q, k, v, scale=scale, window=window, slopes=slopes, causal=causal)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


@prefill_attention_op.register_fake
def _prefill_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
    slopes: Tensor | None,
    causal: bool,
) -> Tensor:
    del k, v, scale, window, slopes, causal
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)


@torch.library.custom_op("lapilli::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run `fused.rms_norm` as an op."""
    return rms_norm(x, weight, eps).contiguous()


@rms_norm_op.register_fake
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    del weight, eps
    return x.new_empty(x.shape)


@torch.library.custom_op("lapilli::silu_mul", mutates_args=())
def silu_mul_op(gate: Tensor, up: Tensor) -> Tensor:
    """Run `fused.silu_mul` as an op."""
    return silu_mul(gate, up).contiguous()


@silu_mul_op.register_fake
def _silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    del up
    return gate.new_empty(gate.shape)


@torch.library.custom_op("lapilli::rotate", mutates_args=())
def rotate_op(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Run `fused.rotate` as an op."""
    return rotate(x, cos, signed_sin).contiguous()


@rotate_op.register_fake
def _rotate_fake(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    del cos, signed_sin
    return x.new_empty(x.shape)
