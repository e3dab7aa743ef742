"""A linear layer with an adapter beside it, over floats or over a weight stored in few bits."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional

from lapilli.lora.product import Update, lora_product
from lapilli.nn.stored import StoredLinear
from lapilli.shapes import Float, Tensor


class LoraLayer(nn.Module, ABC):
    """W x + b + scaling * B A x, with A and B as `lora_A.weight` [r, in], `lora_B.weight` [out, r].

    Source: Hu et al. 2021, LoRA section 4.1: A starts random and B at zero, so that a fresh
    adapter changes nothing. The names are peft's.
    """

    def __init__(
        self,
        base: nn.Linear | StoredLinear,
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
        """The same layer, its adapter alone in this dtype where one is given."""
        if dtype is not None:
            self.lora_A.to(dtype)
            self.lora_B.to(dtype)
        return self

    @abstractmethod
    def merged(self) -> nn.Linear:
        """A plain linear layer with the update in its weight, summed in float32."""

    def update_rows(self) -> Float[Tensor, "out in"]:
        """What the adapter adds to the weight, in float32."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def _how(self, *, by_onednn: bool) -> Update:
        dropout = self.dropout.p if self.training else 0.0
        return Update(self.scaling, dropout, by_onednn)

    def _product(
        self, x: Tensor, base: Tensor | StoredLinear, bias: Tensor | None, *, by_onednn: bool
    ) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight
        return lora_product(x, base, bias, a, b, how=self._how(by_onednn=by_onednn))


class LoraLinear(LoraLayer):
    """Takes over the parameters of a linear layer under their names: `q_proj.weight` stays.

    Attributes:
        by_onednn: as of the FloatLinear that it was.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, like=base.weight)
        self.weight = base.weight
        self.bias = base.bias
        self.by_onednn = bool(getattr(base, "by_onednn", False))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... out"]:
        """The layer's output with the update."""
        if not torch.compiler.is_compiling():
            return self._product(x, self.weight, self.bias, by_onednn=self.by_onednn)
        out = functional.linear(x, self.weight, self.bias)
        inner = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        update: Tensor = self.lora_B(inner)
        return out + self.scaling * update.to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with the update in its weight, summed in float32."""
        out_features, in_features = self.weight.shape
        plain = nn.Linear(in_features, out_features, bias=False, device="meta")
        # A new tensor: the old one may be a read-only mapping of a file.
        weight = (self.weight.float() + self.update_rows()).to(self.weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain


class LoraStored(LoraLayer):
    """Over a frozen weight in few bits, which stays what it is as `base` (QLoRA).

    Source: Dettmers et al. 2023, QLoRA section 3.
    """

    def __init__(
        self, base: StoredLinear, *, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        like = torch.empty(0, device=next(base.buffers()).device)
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout, like=like)
        self.base = base

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... out"]:
        """The layer's output with the update, of exactly the stored weight."""
        return self._product(x, self.base, None, by_onednn=False)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer in float32 with the update in its weight."""
        plain = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        weight = self.base.weight_rows(0, self.base.out_features) + self.update_rows()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        bias = self.base.plain_bias
        if bias is not None:
            plain.bias = nn.Parameter(bias, requires_grad=False)
        return plain
