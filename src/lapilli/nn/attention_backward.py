"""Attention with a backward pass on a CPU that stores no scores.

    forward     the library's prefill (kernels/prefill.py): inputs and output are kept
    backward    the scores of a stretch of queries again, all heads of a group in one product

torch's own function stores none either, but takes three times as long for 700 positions in float32
and five times in bfloat16, which is computed in float32 here.
"""

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from lapilli.kernels.attention import WIDTH_STEP
from lapilli.kernels.library import native
from lapilli.kernels.prefill import prefill_attention
from lapilli.nn.onednn import has_onednn, onednn_linear
from lapilli.shapes import Float, Tensor

FEWEST = 192
"""Positions from which it is faster than storing all scores of a row."""

_DTYPES = (torch.float32, torch.bfloat16)
_STRETCH = 64  # queries whose scores are made at once: they stay in the cache


def has_native_backward(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether `attention_backward` is the way to take for these."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or native() is None:
        return False
    is_wanted = any(x.requires_grad for x in (q, k, v))
    fits = q.shape[2] == k.shape[2] >= FEWEST and q.shape[3] % WIDTH_STEP == 0 and has_onednn()
    known = all(x.device.type == "cpu" and x.dtype in _DTYPES for x in (q, k, v))
    return is_wanted and fits and known


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
