"""Linear layers with an adapter beside them, over floats or over a quantized weight.

    y = x W^T + b + s * drop(x) A^T B^T

in one step of autograd, which keeps x, once, and x A^T [.., r] for the backward pass: neither the
update nor the dropped x, whose mask takes a byte per number.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lapilli.nn.linear import FrozenQuantizedLinear, onednn_linear, times_transposed
from lapilli.shapes import Bool, Float, Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """The way in which the two small matrices are applied.

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
    base: Tensor | FrozenQuantizedLinear,
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "r K"],
    b: Float[Tensor, "out r"],
    *,
    how: Update,
) -> Float[Tensor, "... out"]:
    """Return the layer's output with the update, in the dtype of x or of the autocast around it."""
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
            if isinstance(base, FrozenQuantizedLinear):
                out = base.times(rows)
            elif how.by_onednn and x.dtype == base.dtype == torch.float32:
                out = onednn_linear(rows, base, bias)
            else:
                cast = None if bias is None else bias.to(x.dtype)
                out = functional.linear(rows, base.to(x.dtype), cast)
            kept = None if keep is None else keep.view(rows.shape)
            inner = times_transposed(_dropped(rows, kept, how.dropout), a)
            out.addmm_(inner, b.t(), alpha=how.scaling)
        ctx.how, ctx.base = how, base if isinstance(base, FrozenQuantizedLinear) else None
        weight = None if isinstance(base, FrozenQuantizedLinear) else base
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
                of_x = ctx.base.grad_input(gradient)
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


class LoraLayer(nn.Module, ABC):
    """A linear layer with an adapter: `lora_A.weight` [r, in] and `lora_B.weight` [out, r].

    Source: Hu et al. 2021, LoRA section 4.1: A starts random and B at zero, so that a fresh
    adapter changes nothing. The names are peft's.
    """

    def __init__(
        self,
        base: nn.Linear | FrozenQuantizedLinear,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.Linear(
            base.in_features, rank, bias=False, device=like.device, dtype=like.dtype
        )
        self.lora_B = nn.Linear(
            rank, base.out_features, bias=False, device=like.device, dtype=like.dtype
        )
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = scaling

    def to_dtype(self, dtype: torch.dtype | None) -> "LoraLayer":
        """Return the same layer, its adapter alone in this dtype where one is given."""
        if dtype is not None:
            self.lora_A.to(dtype)
            self.lora_B.to(dtype)
        return self

    @abstractmethod
    def merged(self) -> nn.Linear:
        """Return a plain linear layer with the update in its weight, summed in float32."""

    def update_rows(self) -> Float[Tensor, "out in"]:
        """Return what the adapter adds to the weight, in float32."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def _product(
        self,
        x: Tensor,
        base: Tensor | FrozenQuantizedLinear,
        bias: Tensor | None = None,
        *,
        by_onednn: bool = False,
    ) -> Tensor:
        how = Update(self.scaling, self.dropout.p if self.training else 0.0, by_onednn)
        return lora_product(x, base, bias, self.lora_A.weight, self.lora_B.weight, how=how)


class LoraLinear(LoraLayer):
    """An adapter over floats, which takes their parameters over by name: `q_proj.weight` stays.

    Attributes:
        by_onednn: as of the FloatLinear that it was.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, like=base.weight)
        self.weight = base.weight
        self.bias = base.bias
        self.by_onednn = bool(getattr(base, "by_onednn", False))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... out"]:
        """Return the layer's output with the update."""
        if not torch.compiler.is_compiling():
            return self._product(x, self.weight, self.bias, by_onednn=self.by_onednn)
        out = functional.linear(x, self.weight, self.bias)
        inner = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        update: Tensor = self.lora_B(inner)
        return out + self.scaling * update.to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain linear layer with the update in its weight, summed in float32."""
        out_features, in_features = self.weight.shape
        plain = nn.Linear(in_features, out_features, bias=False, device="meta")
        # A new tensor: the old one may be a read-only mapping of a file.
        weight = (self.weight.float() + self.update_rows()).to(self.weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain


class QLoraLinear(LoraLayer):
    """An adapter over a frozen quantized weight, which stays what it is as `base` (QLoRA).

    Source: Dettmers et al. 2023, QLoRA section 3.
    """

    def __init__(
        self, base: FrozenQuantizedLinear, *, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        like = torch.empty(0, device=next(base.buffers()).device)
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, like=like)
        self.base = base

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... out"]:
        """Return the layer's output with the update, of exactly the stored weight."""
        return self._product(x, self.base)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain linear layer in float32 with the update in its weight."""
        plain = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        weight = self.base.weight_rows(0, self.base.out_features) + self.update_rows()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        bias = self.base.plain_bias
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        return plain
