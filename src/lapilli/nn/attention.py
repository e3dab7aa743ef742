"""Scaled dot-product attention with grouped heads, its masks, and its backward pass on a CPU.

    query heads [B, Q, T, A]   key/value heads [B, K, S, A]   S = positions in the cache + T

A mask is None (every query sees all positions up to its own), Bool (True: may look) or an additive
float bias. A query that would see nothing sees itself, so that rows of padding stay finite.

Learning stores no scores: the forward pass is the library's prefill, whose inputs and output are
kept; the backward pass makes the scores of a stretch of queries again, all heads of a group in one
product. torch's own function stores none either; `has_native_backward` says where it is the slower
one. bfloat16 is computed in float32 here.
"""

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from lapilli.kernels.attention import (
    WIDTH_STEP,
    decode_attention,
    decodes_natively,
    prefill_attention,
    prefills_natively,
)
from lapilli.kernels.library import native
from lapilli.nn.linear import has_bfloat16_products, has_onednn, onednn_linear
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


def causal_bias(
    slopes: Float[Tensor, " Q"],
    mask: Bool[Tensor, "rows 1 T S"] | None,
    num_queries: int,
    num_keys: int,
    like: Tensor,
) -> Float[Tensor, "rows Q T S"]:
    """Return -slope * distance where a key is seen, minus infinity elsewhere (ALiBi).

    Args:
        slopes: per head, what every position of distance takes off the score.
        mask: from `causal_mask`, with the same numbers.
        num_queries: T, the last of the S positions.
        num_keys: S.
        like: a tensor of the dtype and on the device of the scores.
    """
    keys = torch.arange(num_keys, device=like.device)
    distance = keys[num_keys - num_queries :, None] - keys  # [T, S]
    bias = -slopes[:, None, None] * distance  # [Q, T, S]
    if mask is None:
        mask = distance >= 0
    return bias.to(like.dtype).masked_fill(~mask, float("-inf")).view(-1, *bias.shape)


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


FEWEST = 384
"""Positions from which it is faster than torch's own."""
LEAST_SHARED = 192
"""Width of a head times the query heads that share its keys, below which its products are too small
to be faster than torch's own at any length. Measured in float32 (AVX-512, torch 2.13)."""

_STRETCH = 64  # queries whose scores are made at once: they stay in the cache


def has_native_backward(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether `attention_backward` is the way to take for these."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or native() is None:
        return False
    is_wanted = any(x.requires_grad for x in (q, k, v))
    fits = q.shape[2] == k.shape[2] and q.shape[3] % WIDTH_STEP == 0 and has_onednn()
    known = all(x.device.type == "cpu" and x.dtype == q.dtype for x in (q, k, v))
    return is_wanted and fits and known and _pays(q, k)


def _pays(q: Tensor, k: Tensor) -> bool:
    """Return whether `attention_backward` is faster than torch's own function.

    bfloat16 is computed in float32, which pays only where the CPU has no products of bfloat16.
    """
    dtypes = (torch.float32,) if has_bfloat16_products() else (torch.float32, torch.bfloat16)
    shared = q.shape[1] // k.shape[1] * q.shape[3]
    return q.dtype in dtypes and q.shape[2] >= FEWEST and shared >= LEAST_SHARED


def attention_backward(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B K T A"],
    v: Float[Tensor, "B K T A"],
    *,
    scale: float | None = None,
    causal: bool = True,
) -> Float[Tensor, "B Q T A"]:
    """Compute attention of every position, with gradients.

    Args:
        q: queries, Q a multiple of K.
        k: keys.
        v: values.
        scale: factor on the scores, 1 / sqrt(A) when None.
        causal: a query sees nothing after itself.

    Source: the formula of prefill_reference; the order of the backward pass is that of Dao et al.
        2022, FlashAttention, appendix B.4, with the softmax made anew.
    """
    if has_torch_function((q, k, v)):  # as torch's own: a mode may look on, or take its place
        seen: Tensor = handle_torch_function(
            attention_backward, (q, k, v), q, k, v, scale=scale, causal=causal
        )
        return seen
    if scale is None:
        scale = q.shape[3] ** -0.5
    found: Tensor = _Attention.apply(q, k, v, scale, causal)  # type: ignore[no-untyped-call]  # torch's own
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # noqa: ANN401  torch's protocol
        q, k, v, scale, causal = given
        out = prefill_attention(q, k, v, scale=scale, causal=causal)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401  torch's protocol
        q, k, v, out = ctx.saved_tensors
        (gradient,) = gradients
        group = q.shape[1] // k.shape[1]
        weighed = (gradient.float() * out.float()).sum(dim=-1)  # [B, Q, T]
        found = [torch.zeros(x.shape, dtype=torch.float32) for x in (q, k, v)]
        for row in range(q.shape[0]):
            for head in range(k.shape[1]):
                heads = slice(head * group, (head + 1) * group)
                _head(
                    [x[row, heads].float() for x in (q, gradient)],
                    [x[row, head].float().contiguous() for x in (k, v)],
                    weighed[row, heads],
                    (found[0][row, heads], found[1][row, head], found[2][row, head]),
                    scale=ctx.scale,
                    causal=ctx.causal,
                )
        q_found, k_found, v_found = (
            x.to(like.dtype) for x, like in zip(found, (q, k, v), strict=True)
        )
        return q_found, k_found, v_found, None, None


def _head(
    of_queries: list[Float[Tensor, "G T A"]],
    of_keys: list[Float[Tensor, "T A"]],
    weighed: Float[Tensor, "G T"],
    found: tuple[Float[Tensor, "G T A"], Float[Tensor, "T A"], Float[Tensor, "T A"]],
    *,
    scale: float,
    causal: bool,
) -> None:
    """Add the gradients of one head of keys, and of the queries that share it, to `found`."""
    (queries, gradient), (keys, values) = of_queries, of_keys
    q_found, k_found, v_found = found
    group, length, width = queries.shape
    queries = queries * scale
    for start in range(0, length, _STRETCH):
        stop = min(start + _STRETCH, length)
        end = stop if causal else length
        here = slice(start, stop)
        q = queries[:, here].reshape(-1, width)
        g = gradient[:, here].reshape(-1, width)
        k, v = keys[:end], values[:end]
        scores = onednn_linear(q, k, None)  # [G n, end]
        if causal:
            count = stop - start
            later = torch.ones(count, count, dtype=torch.bool).triu_(1)
            scores.view(group, count, end)[:, :, start:].masked_fill_(later, float("-inf"))
        shares = torch.softmax(scores, dim=-1)
        v_found[:end] += onednn_linear(shares.t(), g.t(), None)
        moved = onednn_linear(g, v, None)
        moved -= weighed[:, here].reshape(-1, 1)
        moved *= shares
        q_found[:, here] = (onednn_linear(moved, k.t(), None) * scale).view(group, -1, width)
        k_found[:end] += onednn_linear(moved.t(), q.t(), None)
