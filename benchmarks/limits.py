"""What the machine can do at most: bytes read and operations done in a second, best kernel wins.

    bytes      sums, matrix x vector and packed matrix x vector over memory larger than the caches
    operations square products in float32 and bfloat16 (torch), in int8 (the packed kernels)

Knows matrices of numbers; must not know models.
"""

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from lapilli.kernels.linear import PackedLinear
from lapilli.kernels.packing import Packed
from lapilli.shapes import Tensor

MIB = 1 << 20


def measure_limits(
    *,
    megabytes: int = 512,
    side: int = 2048,
    seconds: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Bytes a second, and operations a second by number format.

    Args:
        megabytes: read in one go; several times the caches, or the figure says nothing.
        side: of the matrices that are multiplied.
        seconds: that each kernel is tried for.
        clock: that times a call.
    """
    found = {"bytes_per_s": _bandwidth(megabytes * MIB, seconds, clock)}
    for name in ("float32", "bfloat16", "int8"):
        call = _product(name, side)
        found[f"{name}_per_s"] = 2.0 * side**3 / _best(call, seconds, clock)
    return found


@torch.inference_mode()
def _best(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """The shortest time of one call; the first one does not count."""
    call()
    best, ending = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ending or best == float("inf"):
        started = clock()
        call()
        best = min(best, clock() - started)
    return best


def _bandwidth(size: int, seconds: float, clock: Callable[[], float]) -> float:
    """The best of several ways to read memory: none of them is the fastest everywhere."""
    columns = 4096
    rows = size // 4 // columns
    floats = torch.rand(rows, columns)
    vector = torch.rand(columns)
    times = [
        _best(lambda: torch.mv(floats, vector), seconds, clock),
        _best(lambda: floats.view(torch.int32).max(), seconds, clock),
        _best(lambda: floats.sum(), seconds, clock),
    ]
    # The same memory again, as weights of one layer.
    packed = PackedLinear(_packed(floats.view(torch.uint8).view(-1, columns)))
    row = torch.rand(1, columns)
    times.append(_best(lambda: packed(row), seconds, clock))
    return floats.nbytes / min(times)


def _packed(bytes_of_weights: Tensor) -> Packed:
    """Random bytes as an int8 layer of the fastest group; what they stand for does not matter."""
    out_features, in_features = bytes_of_weights.shape
    data = bytes_of_weights.view(out_features // 16, in_features // 4, 64)
    scales = torch.full((out_features // 16, 16), 1e-3)
    return Packed(data, scales, None, None, out_features, in_features, 128, 8)


def _product(name: str, side: int) -> Callable[[], object]:
    x = torch.rand(side, side)
    if name == "int8":
        packed = PackedLinear(_packed(torch.randint(1, 255, (side, side), dtype=torch.uint8)))
        return lambda: packed(x)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    weight, seen = torch.rand(side, side).to(dtype), x.to(dtype)
    return lambda: functional.linear(seen, weight)
