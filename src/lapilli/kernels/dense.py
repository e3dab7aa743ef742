"""Few tokens times a weight as torch has it: limited by how fast the weight is read.

torch's product of one row reaches half of the memory bandwidth of a CPU, and less in bfloat16.
No gradients.
"""

import ctypes

import torch
from torch.nn import functional

from lapilli.kernels.library import KINDS, DenseCall, native
from lapilli.shapes import Float, Tensor

_DTYPES = (torch.float32, torch.bfloat16)


def dense_reference(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "out K"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """The same as `dense` by torch."""
    return functional.linear(x, weight, bias)


def is_dense_native(x: Tensor, weight: Tensor) -> bool:
    """Whether the library has the product of these."""
    return (
        weight.dtype in _DTYPES
        and x.dtype == weight.dtype
        and x.device.type == weight.device.type == "cpu"
        and weight.stride(1) == 1
        and native() is not None
    )


def dense(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "out K"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "... out"]:
    """The product x W^T + b, summed in float32, in the dtype of x.

    Args:
        x: few rows: every one of them is met while the weight is read once.
        weight: float32 or bfloat16; anything else, or without the library, goes to torch.
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
        bias=None if added is None else added.data_ptr(),
        y=out.data_ptr(),
        rows=out_features,
        inputs=in_features,
        tokens=rows.shape[0],
        w_stride=weight.stride(0),
        x_stride=rows.stride(0),
        y_stride=out_features,
        kind=KINDS[weight.dtype],
        threads=torch.get_num_threads(),
    )
    library.functions.lapilli_dense(ctypes.byref(call))
    return out.to(x.dtype).view(*x.shape[:-1], out_features)
