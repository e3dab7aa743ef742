"""Scaled dot-product attention with grouped heads, and its masks.

    query heads [B, Q, T, A]   key/value heads [B, K, S, A]   S = positions in the cache + T

A mask is None (every query sees all positions up to its own), Bool (True: may look) or an additive
float bias. A query that would see nothing sees itself, so that rows of padding stay finite.
"""

import torch
from torch.nn import functional

from lapilli.kernels.attention import decode_attention, decodes_natively
from lapilli.kernels.prefill import prefill_attention, prefills_natively
from lapilli.nn.attention_backward import attention_backward, has_native_backward
from lapilli.shapes import Bool, Float, Tensor

SCORE_BYTES = 64 << 20
"""Of the scores that are stored at once where no kernel does without storing them."""


def causal_mask(
    attention_mask: Bool[Tensor, "B S"] | None,
    num_queries: int,
    num_keys: int,
    *,
    window: int | None = None,
    device: torch.device,
) -> Bool[Tensor, "rows 1 T S"] | None:
    """Return which keys the last `num_queries` positions may look at; None when plain causal.

    Args:
        attention_mask: False for padding among the keys; None when no row is padded.
        num_queries: T, the positions of this pass.
        num_keys: S, all positions so far; the queries are the last T of them.
        window: a query sees its own and the `window - 1` positions before it (Mistral).
        device: where the mask is made.
    """
    # Asking a GPU would wait for it; there the caller passes None when it knows that rows are full.
    if attention_mask is not None and device.type == "cpu" and bool(attention_mask.all()):
        attention_mask = None
    if window is not None and num_keys <= window:
        window = None
    offset = num_keys - num_queries
    plain = num_queries == 1 or offset == 0
    if attention_mask is None and window is None and plain:
        return None
    queries = torch.arange(offset, num_keys, device=device)[:, None]  # [T, 1]
    keys = torch.arange(num_keys, device=device)[None, :]  # [1, S]
    seen = keys <= queries  # [T, S]
    if window is not None:
        seen &= keys > queries - window
    if attention_mask is None:
        return seen[None, None]
    looks = seen & attention_mask[:, None, :]  # [B, T, S]
    blind = ~looks.any(dim=-1, keepdim=True)
    return (looks | (blind & (keys == queries)))[:, None]


def attend(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B K S A"],
    v: Float[Tensor, "B K S A"],
    *,
    mask: Bool[Tensor, "rows 1 T S"] | Float[Tensor, "rows Q T S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B Q T A"]:
    """Compute causal attention of T queries, the last positions among S.

    For a single query the heads of a group are folded into the query length: the keys are then
    read once per group instead of once per head, about 3 x faster than `enable_gqa` on a CPU.

    Args:
        q: queries, Q a multiple of K.
        k: keys.
        v: values.
        mask: from `causal_mask`, or an additive bias that contains the causal mask.
        scale: factor on the scores, 1 / sqrt(A) when None.
        softcap: c, where a score s becomes c tanh(s / c) before the mask.
    """
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    if length == 1 and mask is None and decodes_natively(q, k, v):
        return _decode(q, k, v, scale, softcap)
    if softcap is not None:
        return _attend_capped(q, k, v, mask, scale, softcap)
    if length > 1 and mask is None and prefills_natively(q, k, v):
        return prefill_attention(q, k, v, scale=scale)
    if mask is None and has_native_backward(q, k, v):
        return attention_backward(q, k, v, scale=scale)
    if length == 1 and groups != heads and (mask is None or mask.shape[1] == 1):
        folded = q.reshape(batch, groups, heads // groups, width)
        out = functional.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, 1, width)
    if mask is not None and groups != heads and _wants_equal_heads(q.device):
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and length > 1,
        scale=scale,
        enable_gqa=k.shape[1] != heads,
    )


def _wants_equal_heads(device: torch.device) -> bool:
    """Return whether masked attention of grouped heads would store every score.

    On a GPU flash attention refuses masks, and the other kernel that stores no scores refuses
    unequal numbers of heads.
    """
    return device.type == "cuda"


def attend_all(
    q: Float[Tensor, "B Q T A"], k: Float[Tensor, "B Q S A"], v: Float[Tensor, "B Q S A"]
) -> Float[Tensor, "B Q T A"]:
    """Compute attention of T queries that see all of S positions, as patches of a picture do."""
    if prefills_natively(q, k, v):
        return prefill_attention(q, k, v, causal=False)
    if has_native_backward(q, k, v):
        return attention_backward(q, k, v, causal=False)
    return functional.scaled_dot_product_attention(q, k, v)


def _decode(
    q: Float[Tensor, "B Q 1 A"],
    k: Float[Tensor, "B K S A"],
    v: Float[Tensor, "B K S A"],
    scale: float | None,
    softcap: float | None,
) -> Float[Tensor, "B Q 1 A"]:
    """Attend with one query per row, rows of one length: a contiguous cache is one block a row."""
    batch, length = k.shape[0], k.shape[2]
    table = torch.arange(batch, dtype=torch.int32)[:, None]
    lengths = torch.full((batch,), length, dtype=torch.int32)
    return decode_attention(
        q.squeeze(2), k, v, table, lengths, scale=scale, softcap=softcap
    ).unsqueeze(2)


def _attend_capped(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B K S A"],
    v: Float[Tensor, "B K S A"],
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
) -> Float[Tensor, "B Q T A"]:
    """Compute attention with capped scores, which no library has, some queries at a time.

    Without gradients the scores of a piece take SCORE_BYTES at most, however long the prompt is.
    """
    batch, heads, length, _ = q.shape
    if mask is None:
        mask = causal_ones(length, k.shape[2], q.device)
    rows = length
    if not torch.is_grad_enabled():
        rows = max(1, SCORE_BYTES // (4 * batch * heads * k.shape[2]))
    parts = [
        attend_plain(part, k, v, mask=seen, scale=scale, softcap=softcap)
        for part, seen in zip(*(torch.split(x, rows, dim=2) for x in (q, mask)), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def causal_ones(length: int, keys: int, device: torch.device) -> Bool[Tensor, "1 1 T S"]:
    """Return the mask of T queries, the last of S positions, that see all up to their own."""
    ones = torch.ones(1, 1, length, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - length)


def attend_plain(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B K S A"],
    v: Float[Tensor, "B K S A"],
    *,
    mask: Bool[Tensor, "rows 1 T S"] | Float[Tensor, "rows Q T S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B Q T A"]:
    """Compute the same as `attend`, as the formula says it; the tests compare with it."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if mask is None:
        mask = causal_ones(q.shape[2], k.shape[2], q.device)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = mask
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    scores = scores + bias
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v
