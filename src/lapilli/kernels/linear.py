"""Packed weights times float activations: reference, native call and custom op.

    y = x W^T + b      activations rounded to 8 bits by token and group, or left in float32
                       (weight_only); several W that meet the same x share one call

The eager path calls the library directly, since a custom op's dispatch costs more than a small
layer; while torch compiles, the op `lapilli::linear` stands in its place. No gradients.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch.nn import functional

from lapilli.errors import ConfigError
from lapilli.kernels.library import Library, Weights, native
from lapilli.kernels.packing import Packed, rounded
from lapilli.shapes import Float, Tensor


def linear_reference(
    x: Float[Tensor, "M K"], packed: Packed, *, weight_only: bool = False
) -> Float[Tensor, "M out"]:
    """The same as `linear` in plain torch, in float32."""
    seen = x.float() if weight_only else rounded(x, packed.group_size)
    return functional.linear(seen, packed.dequantize(), packed.plain_bias)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def native_weights(packed: Packed) -> Weights:
    """The weight as the library takes it; its tensors have to outlive it."""
    wide = packed.bits == 8
    return Weights(
        data=packed.data.data_ptr(),
        half_scales=None if wide else packed.scales.data_ptr(),
        row_scales=packed.scales.data_ptr() if wide else None,
        zeros=_address(packed.zeros),
        bias=_address(packed.bias),
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
    """The library's products of float32 rows, contiguous along K, with weights packed alike."""
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
    """A packed weight ready to be called, the native description made once."""

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
            weight_only,
            self.library is None,
        )
        """Weights of the same kind can meet the same activations in one call."""

    def __getstate__(self) -> tuple[Packed, bool]:
        """For copies, whose tensors lie elsewhere."""
        return self.packed, self.weight_only

    def __setstate__(self, state: tuple[Packed, bool]) -> None:
        self.__init__(state[0], weight_only=state[1])  # type: ignore[misc]  # begins as a new one

    def __call__(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... out"]:
        """The product in the dtype of x.

        Raises:
            ConfigError: a gradient is wanted.
        """
        return linears(x, (self,))[0]


def linears(
    x: Float[Tensor, "... K"], layers: Sequence[PackedLinear]
) -> list[Float[Tensor, "... out"]]:
    """Products of one input with weights of one kind: x is rounded once, the rows share one call.

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
    bias: Tensor | None,
    sizes: list[int],
    weight_only: bool,
) -> Tensor:
    """`PackedLinear` for torch.compile; sizes = [out_features, in_features, group_size, bits]."""
    out_features, in_features, group_size, bits = sizes
    packed = Packed(data, scales, zeros, bias, out_features, in_features, group_size, bits)
    return PackedLinear(packed, weight_only=weight_only)(x)


@linear_op.register_fake
def _linear_fake(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    sizes: list[int],
    weight_only: bool,
) -> Tensor:
    del data, scales, zeros, bias, weight_only
    return x.new_empty(*x.shape[:-1], sizes[0])
