"""Products of few rows with a plain weight, and of any with a packed one."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from lapilli.errors import ConfigError
from lapilli.kernels.library import WEIGHT_KINDS, DenseCall, Library, Weights, address, native
from lapilli.kernels.packing import Packed, rounded
from lapilli.shapes import Float, Tensor

_DTYPES = (torch.float32, torch.bfloat16)
_KEPT = (*_DTYPES, torch.float16)


def dense_reference(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "out K"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """Compute the same as `dense` by torch."""
    if weight.dtype == x.dtype:
        return functional.linear(x, weight, bias)
    added = None if bias is None else bias.float()
    return functional.linear(x.float(), weight.float(), added).to(x.dtype)


def is_dense_native(x: Tensor, weight: Tensor) -> bool:
    """Return whether the library has the product of these."""
    is_kept = x.dtype == torch.float32 and weight.dtype in _KEPT
    return (
        (is_kept or (x.dtype == weight.dtype and weight.dtype in _DTYPES))
        and x.device.type == weight.device.type == "cpu"
        and weight.stride(1) == 1
        and native() is not None
    )


def dense(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "out K"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """Return the product x W^T + b, summed in float32, in the dtype of x.

    Args:
        x: few rows: every one of them is met while the weight is read once.
        weight: float32 or bfloat16 as x, or float16 or bfloat16 to an x of float32; anything else,
            or without the library, goes to torch.
        bias: in the dtype of the weight, or None.
    """
    library = native()
    if library is None or not is_dense_native(x, weight):
        return dense_reference(x, weight, bias)
    out_features, in_features = weight.shape
    rows = x.reshape(-1, in_features).float()
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    added = None if bias is None else bias.float().contiguous()
    out = torch.empty((rows.shape[0], out_features), dtype=torch.float32)
    call = DenseCall(
        w=weight.data_ptr(),
        x=rows.data_ptr(),
        bias=address(added),
        y=out.data_ptr(),
        rows=out_features,
        inputs=in_features,
        tokens=rows.shape[0],
        w_stride=weight.stride(0),
        x_stride=rows.stride(0),
        y_stride=out_features,
        kind=WEIGHT_KINDS[weight.dtype],
        threads=torch.get_num_threads(),
    )
    library.functions.lapilli_dense(ctypes.byref(call))
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def linear_reference(
    x: Float[Tensor, "M K"], packed: Packed, *, weight_only: bool = False
) -> Float[Tensor, "M out"]:
    """Compute the same as `linear` in plain torch, in float32."""
    seen = x.float() if weight_only else rounded(x, packed.group_size)
    return functional.linear(seen, packed.dequantize(), packed.plain_bias)


def native_weights(packed: Packed) -> Weights:
    """Describe the weight to the library; its tensors have to outlive the description."""
    by_row = packed.bits == 8 or packed.span_scales is not None
    return Weights(
        data=packed.data.data_ptr(),
        half_scales=None if by_row else packed.scales.data_ptr(),
        row_scales=packed.scales.data_ptr() if by_row else None,
        zeros=address(packed.zeros),
        span_scales=address(packed.span_scales),
        bias=address(packed.bias),
        rows=packed.out_features,
        inputs=packed.in_features,
        group=packed.group_size,
        bits=packed.bits,
    )


def linear_native(
    library: Library,
    x: Float[Tensor, "M K"],
    weights: Sequence[Weights],
    *,
    weight_only: bool = False,
) -> list[Float[Tensor, "M out"]]:
    """Compute products of float32 rows, contiguous along K, with weights packed alike."""
    count, tokens = len(weights), x.shape[0]
    outs = [torch.empty((tokens, weight.rows), dtype=torch.float32) for weight in weights]
    pointers = ctypes.c_void_p * count
    library.functions.lapilli_linear(
        pointers(*map(ctypes.addressof, weights)),
        pointers(*[out.data_ptr() for out in outs]),
        count,
        x.data_ptr(),
        tokens,
        x.stride(0),
        torch.get_num_threads(),
        int(weight_only),
    )
    return outs


class PackedLinear:
    """A packed weight ready to be called, described to the library once."""

    def __init__(self, packed: Packed, *, weight_only: bool = False) -> None:
        self.packed = packed
        self.weight_only = weight_only
        self.library = native() if packed.data.device.type == "cpu" else None
        self.weights = native_weights(packed)
        self.kind = (
            packed.in_features,
            packed.group_size,
            packed.bits,
            packed.zeros is None,
            packed.span_scales is None,
            weight_only,
            self.library is None,
        )
        """Weights of the same kind can meet the same activations in one call."""

    def __getstate__(self) -> tuple[Packed, bool]:
        """Return the state of a copy, whose tensors lie elsewhere."""
        return self.packed, self.weight_only

    def __setstate__(self, state: tuple[Packed, bool]) -> None:
        self.__init__(state[0], weight_only=state[1])  # type: ignore[misc]  # begins as a new one

    def __call__(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """Return the product in the dtype of x.

        Raises:
            ConfigError: a gradient is wanted.
        """
        return linears(x, (self,))[0]


def linears(
    x: Float[Tensor, "... K"], layers: Sequence[PackedLinear]
) -> list[Float[Tensor, "... out"]]:
    """Compute products of one input with weights of one kind: x is rounded once, in one call.

    Raises:
        ConfigError: a gradient is wanted.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            "quantized layers have no gradients: run under torch.no_grad(), and train on the "
            "model as it was before quantize()"
        )
    first = layers[0]
    rows = x.reshape(-1, first.packed.in_features)
    if first.library is None:
        outs = [linear_reference(rows, y.packed, weight_only=y.weight_only) for y in layers]
    else:
        rows = rows.float()
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        weights = [layer.weights for layer in layers]
        outs = linear_native(first.library, rows, weights, weight_only=first.weight_only)
    return [out.to(x.dtype).view(*x.shape[:-1], out.shape[1]) for out in outs]


@torch.library.custom_op("lapilli::linear", mutates_args=())
def linear_op(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    span_scales: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    weight_only: bool,
) -> Tensor:
    """Compute `PackedLinear` for torch.compile.

    Args:
        x: see `PackedLinear`.
        data: see `Packed`, as all that follow.
        scales: likewise.
        zeros: likewise.
        span_scales: likewise.
        bias: likewise.
        sizes: out, in, group_size, bits.
        weight_only: see `PackedLinear`.
    """
    out_features, in_features, group_size, bits = sizes
    parts = (data, scales, zeros, bias)
    packed = Packed(*parts, out_features, in_features, group_size, bits, span_scales)
    return PackedLinear(packed, weight_only=weight_only)(x)


@linear_op.register_fake
def _linear_fake(x: Tensor, *given: Any) -> Tensor:  # noqa: ANN401  as linear_op's
    sizes: list[int] = given[5]
    return x.new_empty(*x.shape[:-1], sizes[0])
