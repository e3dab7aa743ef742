"""Small operations between the products: norm, gate, rotation; each in one pass over its rows.

Each has a plain-torch reference, and a native path for float32 on a CPU where no gradient is
wanted. torch takes several passes for each, which costs more than the arithmetic of one token.
"""

import ctypes
from collections.abc import Callable

import torch
from torch.nn import functional

from lapilli.kernels.library import Library, RotateCall, RowsCall, native
from lapilli.shapes import Float, Tensor

_PAIR_STEP = 32  # widths of heads that the library rotates


def _library(*tensors: Tensor) -> Library | None:
    """Return the library, where it can stand in for torch on these tensors."""
    if torch.compiler.is_compiling():
        return None
    needs_gradient = torch.is_grad_enabled()
    for x in tensors:
        fits = x.dtype == torch.float32 and x.device.type == "cpu"
        if not fits or (needs_gradient and x.requires_grad):
            return None
    return native()


def rms_norm_reference(
    x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float, offset: float = 0.0
) -> Float[Tensor, "... D"]:
    """Compute the same as `rms_norm` in plain torch, statistics in float32."""
    normed = functional.rms_norm(x.float(), weight.shape, None, eps)
    if offset:
        return (normed * (offset + weight.float())).to(x.dtype)
    return weight * normed.to(x.dtype)


def rms_norm(
    x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float, offset: float = 0.0
) -> Float[Tensor, "... D"]:
    """Scale the last axis to a root mean square of one, times offset + weight.

    Without an offset the product is taken in the dtype of x, as in the Llama reference, with one in
    float32, as in Gemma's.
    """
    library = _library(x, weight)
    if library is None or not weight.is_contiguous():
        return rms_norm_reference(x, weight, eps, offset)
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _rows(library.functions.lapilli_rms_norm, x, weight, out, width=width, eps=eps, offset=offset)
    return out


def silu_mul_reference(
    gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """Compute the same as `silu_mul` in plain torch."""
    return functional.silu(gate) * up


def silu_mul(gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Return silu(gate) * up, element by element."""
    library = _library(gate, up)
    if library is None or gate.shape != up.shape:
        return silu_mul_reference(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _rows(library.functions.lapilli_silu_mul, gate, up, out, width=max(gate.shape[-1], 1))
    return out


def gelu_mul_reference(
    gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """Compute the same as `gelu_mul` in plain torch."""
    return functional.gelu(gate, approximate="tanh") * up


def gelu_mul(gate: Float[Tensor, "... D"], up: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Return gelu(gate) * up, element by element, by the tanh form of GELU."""
    library = _library(gate, up)
    if library is None or gate.shape != up.shape:
        return gelu_mul_reference(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _rows(library.functions.lapilli_gelu_mul, gate, up, out, width=max(gate.shape[-1], 1))
    return out


def _rows(
    function: Callable[[object], None],
    x: Tensor,
    other: Tensor,
    out: Tensor,
    *,
    width: int,
    eps: float = 0.0,
    offset: float = 0.0,
) -> None:
    call = RowsCall(
        x=x.data_ptr(),
        other=other.data_ptr(),
        y=out.data_ptr(),
        rows=x.numel() // width,
        width=width,
        x_stride=width,
        threads=torch.get_num_threads(),
        eps=eps,
        offset=offset,
    )
    function(ctypes.byref(call))


def rotate_reference(
    x: Float[Tensor, "B heads T A"],
    cos: Float[Tensor, "B 1 T A"],
    signed_sin: Float[Tensor, "B 1 T A"],
) -> Float[Tensor, "B heads T A"]:
    """Compute the same as `rotate` in plain torch.

    Rolling by half a head and a signed sine do the work of the textbook's negate-and-concatenate
    in three operations instead of five, with the same roundings.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def rotate(
    x: Float[Tensor, "B heads T A"],
    cos: Float[Tensor, "B 1 T A"],
    signed_sin: Float[Tensor, "B 1 T A"],
) -> Float[Tensor, "B heads T A"]:
    """Turn each pair (i, i + A/2) of a head by the angle of its position.

    The first half of `signed_sin` carries the minus of the rotation.
    """
    library = _library(x, cos, signed_sin)
    batch, heads, length, width = x.shape
    if library is None or width % _PAIR_STEP or x.stride(-1) != 1:
        return rotate_reference(x, cos, signed_sin)
    cos, signed_sin = cos.contiguous(), signed_sin.contiguous()
    out = torch.empty_like(x)
    call = RotateCall(
        x=x.data_ptr(),
        cosine=cos.data_ptr(),
        sine=signed_sin.data_ptr(),
        y=out.data_ptr(),
        rows=batch,
        heads=heads,
        positions=length,
        width=width,
        x_row=x.stride(0),
        x_head=x.stride(1),
        x_position=x.stride(2),
        y_row=out.stride(0),
        y_head=out.stride(1),
        y_position=out.stride(2),
        threads=torch.get_num_threads(),
    )
    library.functions.lapilli_rotate(ctypes.byref(call))
    return out
