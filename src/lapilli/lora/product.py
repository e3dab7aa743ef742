"""y = x W^T + b + s * drop(x) A^T B^T in one step of autograd; knows matrices, no modules.

What is kept for the backward pass is x, once, and x A^T [.., r]: neither the update nor the dropped
x, whose mask takes a byte per number.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lapilli.nn.onednn import onednn_linear, times_transposed
from lapilli.nn.stored import StoredLinear
from lapilli.shapes import Bool, Float, Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """How the two small matrices are applied.

    Attributes:
        scaling: factor on the update.
        dropout: probability that an input of A is dropped; the others grow.
        by_onednn: float32 on a CPU goes to oneDNN.
    """

    scaling: float
    dropout: float
    by_onednn: bool


def lora_product(
    x: Float[Tensor, "... K"],
    base: Tensor | StoredLinear,
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "r K"],
    b: Float[Tensor, "out r"],
    *,
    how: Update,
) -> Float[Tensor, "... out"]:
    """The layer's output with the update, in the dtype of x or of the autocast around it."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    keep = torch.rand_like(x, dtype=torch.float32) >= how.dropout if how.dropout else None
    found: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]  # torch's own
        x, base, bias, a.to(x.dtype), b.to(x.dtype), keep, how
    )
    return found


def _dropped(x: Tensor, keep: Bool[Tensor, "..."] | None, dropout: float) -> Tensor:
    return x if keep is None else x * keep * (1 / (1 - dropout))


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # noqa: ANN401  torch's protocol
        x, base, bias, a, b, keep, how = given
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            if isinstance(base, StoredLinear):
                out = base.times(rows)
            elif how.by_onednn and x.dtype == base.dtype == torch.float32:
                out = onednn_linear(rows, base, bias)
            else:
                cast = None if bias is None else bias.to(x.dtype)
                out = functional.linear(rows, base.to(x.dtype), cast)
            kept = None if keep is None else keep.view(rows.shape)
            inner = times_transposed(_dropped(rows, kept, how.dropout), a)
            out.addmm_(inner, b.t(), alpha=how.scaling)
        ctx.how, ctx.base = how, base if isinstance(base, StoredLinear) else None
        weight = None if isinstance(base, StoredLinear) else base
        ctx.save_for_backward(x, weight, a, b, keep, inner)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401  torch's protocol
        x, weight, a, b, keep, inner = ctx.saved_tensors
        how: Update = ctx.how
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        kept = None if keep is None else keep.view(rows.shape)
        narrow = times_transposed(gradient, b.t()) * how.scaling  # [M, r]
        of_a = times_transposed(narrow.t(), _dropped(rows, kept, how.dropout).t())
        of_b = times_transposed(gradient.t(), inner.t()) * how.scaling
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.base is not None:
                of_x = ctx.base.times_back(gradient)
            else:
                of_x = times_transposed(gradient, weight.to(x.dtype).t())
            if kept is None:
                of_x.addmm_(narrow, a)
            else:
                of_x += _dropped(narrow @ a, kept, how.dropout)
            of_x = of_x.view(x.shape)
        if ctx.needs_input_grad[1] and weight is not None:
            of_weight = times_transposed(gradient.t(), rows.t()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_x, of_weight, of_bias, of_a, of_b, None, None
