"""Products on a CPU by oneDNN, with and without gradients.

torch gives float32 to MKL, which leaves half of some CPUs unused; oneDNN computes the same three
products of a linear layer: x W^T forward, g W and g^T x backward. It writes a program for every
new shape and keeps the last thousand, so rows come in few sizes: `rounded`.
"""

from typing import Any

import torch

from lapilli.shapes import Float, Tensor


def rounded(length: int) -> int:
    """Return the next of few sizes, at most a 16th above `length`: 16 of them between n and 2 n.

    oneDNN takes longer to write a program for a new shape than for a small product itself, and
    pebble in bfloat16 keeps 5 MiB of them for every new length of a batch.
    """
    step = 1 << max(length.bit_length() - 5, 0)
    return -(-length // step) * step


def has_onednn() -> bool:
    """Return whether this build of torch has the product."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "out K"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """Compute the same as `functional.linear`, by oneDNN; no gradients."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # a weight with gaps takes oneDNN hundreds of times as long
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def times_transposed(x: Float[Tensor, "M K"], y: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """Return x y^T without gradients; float32 on a CPU by oneDNN where torch has it."""
    is_float = x.dtype == y.dtype == torch.float32
    if is_float and x.device.type == "cpu" and has_onednn():
        return onednn_linear(x, y, None)
    return x @ y.t()


def linear_with_backward(
    x: Float[Tensor, "... K"],
    weight: Float[Tensor, "out K"],
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "... out"]:
    """Return x W^T + b of float32 on a CPU, with gradients; the same as functional.linear."""
    found: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch's own
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # noqa: ANN401  torch's protocol
        x, weight, bias = given
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401  torch's protocol
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            times_transposed(rows, weight.t()).view(*gradient.shape[:-1], -1) if of_x else None,
            times_transposed(rows.t(), x.reshape(len(rows), -1).t()) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )
