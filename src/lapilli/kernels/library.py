"""The compiled library, loaded with ctypes: the only file that knows that there is one.

    native() -> Library | None      None: not compiled, not for this CPU, or LAPILLI_KERNELS=0

LAPILLI_KERNELS may also name an instruction set (amxint8, avx512vnni, avxvnni, avx2, neondot, neon,
portable). It is read here and not in the command line, because a switch for finding errors must
work in every program.

The library starts no threads: it is handed the GOMP_parallel of the OpenMP that torch has loaded,
so that there is one pool in the process and `torch.set_num_threads` counts for both. A process that
was forked has none of the pool's threads and would wait for them for ever: it works alone.
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lapilli.errors import ConfigError

SWITCH = "LAPILLI_KERNELS"
ABI = 15  # of native/abi.h: a library that was built from older sources is left alone
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
WEIGHT_KINDS = {**KINDS, torch.float16: 3}
"""Number formats of native/abi.h."""
_NAMES = ("liblapilli_kernels.so", "liblapilli_kernels.dylib")


def _fields(pointers: str, numbers: str, reals: str = "") -> list[tuple[str, Any]]:
    """Return the fields of a structure: pointers first, then int64, then double, as in abi.h."""
    kinds = ((pointers, ctypes.c_void_p), (numbers, ctypes.c_int64), (reals, ctypes.c_double))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class Weights(ctypes.Structure):
    """`Weights` of native/abi.h, field by field."""

    _fields_ = _fields(
        "data half_scales row_scales zeros span_scales bias",
        "rows inputs group bits",
    )


class DenseCall(ctypes.Structure):
    """`DenseCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "w x bias y",
        "rows inputs tokens w_stride x_stride y_stride kind threads",
    )


class AttentionCall(ctypes.Structure):
    """`AttentionCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "q keys values key_scales value_scales table lengths slopes out",
        "rows heads kv_heads block_size width table_stride block_stride head_stride kind "
        "window threads",
        "scale softcap",
    )


class PrefillCall(ctypes.Structure):
    """`PrefillCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "q keys values slopes out",
        "batch heads kv_heads queries positions width q_row q_head q_position k_row "
        "k_head k_position v_row v_head v_position out_row out_head out_position causal "
        "window threads",
        "scale",
    )


class StoreCall(ctypes.Structure):
    """`StoreCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "k v keys values blocks offsets",
        "positions heads width k_position k_head v_position v_head block_stride head_stride kind",
    )


class RowsCall(ctypes.Structure):
    """`RowsCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "x other y",
        "rows width x_stride threads",
        "eps offset",
    )


class RotateCall(ctypes.Structure):
    """`RotateCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "x cosine sine y",
        "rows heads positions width x_row x_head x_position y_row y_head y_position threads",
    )


class Product(ctypes.Structure):
    """`Product` of native/abi.h, field by field."""

    _fields_ = _fields(
        "packed plain bias",
        "rows inputs stride kind",
    )


class LayerCall(ctypes.Structure):
    """`LayerCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "input_norm mlp_norm attention_out_norm mlp_out_norm q_norm k_norm q k v o gate "
        "up down x y cosine sine keys values blocks offsets table lengths",
        "tokens heads kv_heads width block_size table_stride block_stride head_stride "
        "kind window weight_only gelu threads",
        "scale eps norm_offset softcap",
    )


class StepCall(ctypes.Structure):
    """`StepCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "x y cosine local_cosine sine local_sine keys values local blocks offsets table lengths",
        "layers tokens block_size table_stride block_stride head_stride kind threads",
    )


class TowerCall(ctypes.Structure):
    """`TowerCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "norm1_weight norm1_bias norm2_weight norm2_bias q k v out fc1 fc2 x y",
        "tiles positions heads width kind activation threads",
        "scale eps",
    )


class RoundCall(ctypes.Structure):
    """`RoundCall` of native/abi.h, field by field."""

    _fields_ = _fields(
        "w data row_scales span_scales refused",
        "rows inputs padded stride threads",
    )


def address(tensor: torch.Tensor | None) -> int | None:
    """Return where the numbers lie; None for no tensor, as a null pointer."""
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of the loaded library.

    Attributes:
        isa: the instruction set in use.
        functions: the library; its functions are named as in native/library.cpp.
    """

    isa: str
    functions: ctypes.CDLL


@functools.cache
def native() -> Library | None:
    """Return the library in use, found and set up once.

    Raises:
        ConfigError: LAPILLI_KERNELS names an instruction set that is not there.
    """
    return open_library(os.environ.get(SWITCH, ""))


def why_not_native() -> str:
    """Return why the kernels are missing without anybody having asked for that, in one line.

    A wheel that was built without a compiler has none, which nothing else would say. Empty where
    they are in use, and where LAPILLI_KERNELS=0 turns them off.
    """
    if native() is not None or os.environ.get(SWITCH) == "0":
        return ""
    built = "were built from other sources" if _find() else "were not built"
    return (
        f"the compiled kernels {built}: answers on this CPU are up to ten times slower; install a "
        "C++ compiler and CMake, then reinstall lapilli"
    )


def open_library(wanted: str = "") -> Library | None:
    """Open the library with the best instruction set, or with the one that `wanted` names.

    The choice counts for the whole process.

    Raises:
        ConfigError: this machine, or this build, does not have the one that is wanted.
    """
    path = _find()
    if path is None or wanted == "0":
        return None
    functions = ctypes.CDLL(str(path))
    if not hasattr(functions, "lapilli_abi") or functions.lapilli_abi() != ABI:
        return None
    _declare(functions)
    named = functions.lapilli_select(wanted.encode())
    if named is None:
        raise ConfigError(f"{SWITCH}={wanted}: this CPU or this build has no such kernels")
    pool = _torch_pool()
    if pool is not None:
        functions.lapilli_use_pool(pool)
    return Library(named.decode(), functions)


def work_alone() -> None:
    """Give this process one thread, if its parent has used a pool that was not forked with it."""
    if native.cache_info().currsize:  # a model was run there
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=work_alone)


def _find() -> Path | None:
    here = Path(__file__).parent
    return next((here / name for name in _NAMES if (here / name).is_file()), None)


def _declare(functions: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    functions.lapilli_select.argtypes = (ctypes.c_char_p,)
    functions.lapilli_select.restype = ctypes.c_char_p
    functions.lapilli_use_pool.argtypes = (pointer,)
    functions.lapilli_use_pool.restype = None
    functions.lapilli_linear.argtypes = (pointer, pointer, number, pointer, *(number,) * 4)
    functions.lapilli_linear.restype = None
    functions.lapilli_step.argtypes = (pointer, pointer)
    functions.lapilli_step.restype = None
    for name in (
        "dense",
        "store",
        "attention",
        "prefill",
        "rms_norm",
        "silu_mul",
        "gelu_mul",
        "rotate",
        "layer",
        "round_levels",
        "tower",
    ):
        function = functions[f"lapilli_{name}"]
        function.argtypes = (pointer,)
        function.restype = None
    functions.lapilli_digests.argtypes = (ctypes.c_char_p, pointer, number, pointer)
    functions.lapilli_digests.restype = None
    functions.lapilli_has_pairs.argtypes = ()
    functions.lapilli_has_pairs.restype = ctypes.c_int


def _torch_pool() -> int | None:
    """Return the address of the GOMP_parallel that torch itself uses; None: one thread.

    torch makes its OpenMP visible to the whole process; where a build does not, it lies among
    torch's libraries.
    """
    folder = Path(torch.__file__).parent / "lib"
    beside = sorted(folder.glob("libgomp*.so*")) + sorted(folder.glob("lib*omp*.dylib"))
    for name in (None, *beside):
        try:
            pool = ctypes.CDLL(None if name is None else str(name)).GOMP_parallel
        except (AttributeError, OSError):
            continue
        return ctypes.cast(pool, ctypes.c_void_p).value
    return None
