"""Prefill attention: many new positions per row over keys and values that are floats.

    prefill_attention(q, k, v)     the last T of S positions; causal, or everything sees everything

torch computes every score under a mask that it reads from memory; here what a query does not see
is never computed. Keys of a head are packed once for all queries that share them. No gradients.
"""

import ctypes

import torch

from lapilli.kernels.attention import WIDTH_STEP
from lapilli.kernels.library import PrefillCall, native
from lapilli.shapes import Float, Tensor

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
        slopes=None if slopes is None else slopes.data_ptr(),
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
