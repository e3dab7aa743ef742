"""A linear layer with an adapter beside it."""

import torch
from torch import nn
from torch.nn import functional

from lapilli.shapes import Float, Tensor


class LoraLinear(nn.Module):
    """W x + b + scaling * B A x; takes over the parameters of a linear layer under their names.

    So `q_proj.weight` stays `q_proj.weight`, and the adapter adds `q_proj.lora_A.weight` [r, in]
    and `q_proj.lora_B.weight` [out, r], which are peft's names.

    Source: Hu et al. 2021, LoRA section 4.1: A starts random and B at zero, so that a fresh
    adapter changes nothing.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = scaling

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... out"]:
        """The layer's output with the update."""
        out = functional.linear(x, self.weight, self.bias)
        inner = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        update: Tensor = self.lora_B(inner)
        return out + self.scaling * update.to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer with the update in its weight, summed in float32."""
        update = self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        out_features, in_features = self.weight.shape
        plain = nn.Linear(in_features, out_features, bias=False, device="meta")
        # A new tensor: the old one may be a read-only mapping of a file.
        weight = (self.weight.float() + update).to(self.weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain
