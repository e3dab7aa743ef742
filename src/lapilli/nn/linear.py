"""Linear layers: of floats on a CPU, of a kernel, and of a frozen quantized weight.

    FloatLinear             few rows by the compiled library, many by oneDNN where it is faster
    KeptLinear              a frozen weight of 16 bits, multiplied as its numbers in float32
    KernelLayer             layers of one kind share a call for one input: `project`
    FrozenQuantizedLinear   W stays quantized, with the gradient of x: floats of some rows at a time

torch gives float32 to MKL, which leaves half of some CPUs unused; oneDNN computes the same three
products of a linear layer: x W^T forward, g W and g^T x backward. It writes a program for every
new shape and keeps the last thousand, so rows come in few sizes: `rounded`.
"""

from abc import ABC, abstractmethod
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from lapilli.kernels.linear import PackedLinear, dense, is_dense_native, linears
from lapilli.shapes import Float, Int, Tensor


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


@cache
def has_bfloat16_products() -> bool:
    """Return whether this CPU multiplies bfloat16 without going through float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name
    asks = (getattr(torch.cpu, name, None) for name in names)
    return any(ask is not None and ask() for ask in asks)


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


FEW = 4
"""Rows up to which a product waits for its weight, whoever computes it."""


class FloatLinear(nn.Linear):
    """A faster nn.Linear in float32 or bfloat16 on a CPU.

    Attributes:
        by_onednn: many rows of float32 go to oneDNN.
    """

    by_onednn = False

    @classmethod
    def of(cls, plain: nn.Linear, *, by_onednn: bool) -> "FloatLinear":
        """Return a layer with the same parameters, not copies of them."""
        layer = cls(
            plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta"
        )
        layer.weight, layer.bias = plain.weight, plain.bias
        layer.by_onednn = by_onednn
        return layer.train(plain.training)

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """Return W x + b."""
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            return functional.linear(x, weight, bias)
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not learns and x.numel() <= FEW * self.in_features and is_dense_native(x, weight):
            return dense(x, weight, bias)
        if self.by_onednn and is_plain_float(x, weight):
            return (linear_with_backward if learns else onednn_linear)(x, weight, bias)
        return functional.linear(x, weight, bias)


def is_plain_float(x: Tensor, weight: Tensor) -> bool:
    """Return whether the product of these is one of float32 on a CPU."""
    is_float = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return is_float and not torch.is_autocast_enabled("cpu")


KEPT_AT_ONCE = 4096
MOST_KEPT = 64
"""Rows up to which a weight of another format than theirs is read in place."""


def kept_linear(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "out K"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """Return the product x W^T + b in the dtype of x, of a weight in any format of floats.

    Its numbers are those of the weight in float32. Few rows of float32 read the weight where it
    lies; many get some rows of it as floats at a time.
    """
    if weight.dtype == x.dtype:
        return functional.linear(x, weight, bias)
    learns = torch.is_grad_enabled() and x.requires_grad
    few = x.numel() <= MOST_KEPT * weight.shape[1] and not torch.compiler.is_compiling()
    if few and not learns and is_dense_native(x, weight):
        return dense(x, weight, bias)
    seen = x.float()
    rows = [functional.linear(seen, piece.float()) for piece in weight.split(KEPT_AT_ONCE)]  # type: ignore[no-untyped-call]
    out = torch.cat(rows, dim=-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


class KeptLinear(nn.Linear):
    """A frozen linear layer in the format of its file, which its input need not have.

    Every token reads the whole output layer: in 16 bits half the bytes of float32, and the same
    numbers.
    """

    @classmethod
    def of(cls, plain: nn.Linear) -> "KeptLinear":
        """Return a layer with the same parameters, not copies of them."""
        layer = cls(
            plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta"
        )
        layer.weight, layer.bias = plain.weight, plain.bias
        return layer.requires_grad_(False).train(plain.training)

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """Return W x + b in the dtype of x; it has the gradient of x."""
        return kept_linear(x, self.weight, self.bias)


def linear_rows(
    x: Float[Tensor, "... K"], layer: nn.Module, rows: Int[Tensor, " n"]
) -> Float[Tensor, "... n"]:
    """Return some of a linear layer's outputs: of these rows of its weight.

    Of plain floats no other row is read; of any other layer all outputs are computed.
    """
    is_plain = type(layer) in (nn.Linear, FloatLinear, KeptLinear) and "forward" not in vars(layer)
    if not is_plain or not isinstance(layer, nn.Linear) or is_hooked(layer):
        every: Tensor = layer(x)
        return every[..., rows]
    bias = None if layer.bias is None else layer.bias[rows]
    return kept_linear(x, layer.weight[rows], bias)


class KernelLayer(nn.Module, ABC):
    """A layer whose product is a kernel's, so that others with the same input can join in."""

    @abstractmethod
    def kernel(self) -> PackedLinear:
        """Return the weight ready to be called."""


def is_hooked(*modules: nn.Module) -> bool:
    """Return whether somebody wants to see or change what goes through one of the modules."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]  # torch has no types for it
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def project(x: Float[Tensor, "... K"], *layers: nn.Module) -> list[Float[Tensor, "... out"]]:
    """Return each layer's output for one input; neighbours that are packed alike share a call."""
    learns = torch.is_grad_enabled() and x.requires_grad
    is_plain = x.device.type == "cpu" and not learns and not torch.compiler.is_compiling()
    if is_plain and not is_hooked(*layers):
        kernels = [layer.kernel() for layer in layers if isinstance(layer, KernelLayer)]
        if len(kernels) == len(layers):
            alike = groupby(kernels, key=lambda kernel: kernel.kind)
            return [out for _, some in alike for out in linears(x, list(some))]
    return [layer(x) for layer in layers]


class FrozenQuantizedLinear(nn.Module, ABC):
    """A linear layer, W x + b, whose frozen W is quantized, with the gradient of x.

    Attributes:
        in_features: of x.
        out_features: of what comes out.
    """

    in_features: int
    out_features: int

    @abstractmethod
    def weight_rows(self, start: int, stop: int) -> Float[Tensor, "rows in"]:
        """Return rows `start` to `stop` of W in float32; `start` is a multiple of 16."""

    def rows_like(self, start: int, stop: int, other: Tensor) -> Float[Tensor, "rows in"]:
        """Return the same rows in the dtype of the other factor."""
        return self.weight_rows(start, stop).to(other)

    @property
    def rows_at_once(self) -> int:
        """Return how many rows are floats at the same time, a multiple of 16."""
        return 1024

    @property
    @abstractmethod
    def plain_bias(self) -> Float[Tensor, " out"] | None:
        """Return the bias."""

    def product(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """Return the layer's output of exactly the stored weight, with the gradient of x."""
        found: Tensor = _FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call]  # torch's own
        return found

    def times(self, rows: Float[Tensor, "M K"]) -> Float[Tensor, "M out"]:
        """Return the product rows W^T + b, without gradients."""
        out = rows.new_empty(len(rows), self.out_features)
        for start, stop in self._pieces():
            out[:, start:stop] = times_transposed(rows, self.rows_like(start, stop, rows))
        bias = self.plain_bias
        return out if bias is None else out.add_(bias.to(rows))

    def grad_input(self, rows: Float[Tensor, "M out"]) -> Float[Tensor, "M K"]:
        """Return the product rows W: the gradient of the input from that of the output."""
        out = rows.new_zeros(len(rows), self.in_features)
        for start, stop in self._pieces():
            piece = self.rows_like(start, stop, rows)
            out += times_transposed(rows[:, start:stop], piece.t())
        return out

    def _pieces(self) -> list[tuple[int, int]]:
        size = self.rows_at_once
        starts = range(0, self.out_features, size)
        return [(start, min(start + size, self.out_features)) for start in starts]


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:  # noqa: ANN401  torch's protocol
        x, layer = given
        ctx.layer = layer
        out: Tensor = layer.times(x.reshape(-1, layer.in_features))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401  torch's protocol
        (gradient,) = gradients
        rows = gradient.reshape(-1, ctx.layer.out_features)
        return ctx.layer.grad_input(rows).view(*gradient.shape[:-1], -1), None
