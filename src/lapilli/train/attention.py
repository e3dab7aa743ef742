"""Attention as three plain products while training on a CPU; knows torch's function, no model.

torch's fused CPU kernel has a slow backward pass in bfloat16: at 32 x 4 x 65 x 64 forward and
backward took 35 ms fused
and 7 ms as written here, on one core. For short rows the matrix of scores is small, so nothing is
lost.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  torch's own habit
from torch.overrides import TorchFunctionMode

from lapilli.shapes import Float, Tensor


class PlainAttention(TorchFunctionMode):
    """Inside `with PlainAttention():` scaled_dot_product_attention without a mask is plain."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  torch's protocol
        """The replacement where it applies, everything else as it is."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and _applies(args, kwargs):
            return plain_attention(*args[:3], is_causal=kwargs.get("is_causal", False))
        return func(*args, **kwargs)


def _applies(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return (
        len(args) == 3
        and kwargs.get("attn_mask") is None
        and kwargs.get("scale") is None
        and not kwargs.get("enable_gqa", False)
        and args[0].shape == args[1].shape
    )


def plain_attention(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B Q T A"],
    v: Float[Tensor, "B Q T A"],
    *,
    is_causal: bool,
) -> Float[Tensor, "B Q T A"]:
    """softmax(q k^T / sqrt(A)) v; twin of torch's fused function."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, Q, T, T]
    if is_causal:
        length = scores.shape[-1]
        blocked = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
        scores = scores + blocked
    return torch.softmax(scores, dim=-1, dtype=scores.dtype) @ v
