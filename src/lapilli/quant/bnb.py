"""4-bit normal floats made floats by bitsandbytes, on its kernels; nf4.py stores what it reads.

    numbers   two a byte, the first in the high half, rows of whole blocks one after the other
    largest   of every block of 64, float32

A layer on a CUDA device is read so where the package is installed; on a CPU nf4.py reads it.
"""

import functools
from importlib import import_module
from importlib.util import find_spec

import torch

from lapilli.shapes import Float, Tensor, UInt8


def reads_on(device: torch.device) -> bool:
    """Whether bitsandbytes reads the layers of this device."""
    return device.type == "cuda" and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return find_spec("bitsandbytes") is not None


def to_floats(
    numbers: UInt8[Tensor, "rows half"],
    largest: Float[Tensor, "rows blocks"],
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "rows inputs"]:
    """The values of the numbers times the largest of their block.

    Args:
        numbers: of whole blocks.
        largest: of every block.
        dtype: float32, bfloat16 or float16.

    Raises:
        ImportError: bitsandbytes cannot be imported.
    """
    rows, half = numbers.shape
    functional = import_module("bitsandbytes").functional
    state = functional.QuantState(
        absmax=largest.flatten(),
        shape=torch.Size((rows, 2 * half)),
        dtype=dtype,
        blocksize=2 * half // largest.shape[1],
        quant_type="nf4",
    )
    found: Tensor = functional.dequantize_4bit(numbers.reshape(-1, 1), state)
    return found
