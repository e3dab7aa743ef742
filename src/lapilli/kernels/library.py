"""The compiled library, loaded with ctypes: the only file that knows that there is one.

    native() -> Library | None      None: not compiled, not for this CPU, or LAPILLI_KERNELS=0

LAPILLI_KERNELS may also name an instruction set (avx512vnni, avxvnni, avx2, neondot, neon,
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

import torch

from lapilli.errors import ConfigError

SWITCH = "LAPILLI_KERNELS"
ABI = 9  # of native/abi.h: a library that was built from older sources is left alone
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Number formats of native/abi.h."""
_NAMES = ("liblapilli_kernels.so", "liblapilli_kernels.dylib")


class Weights(ctypes.Structure):
    """`Weights` of native/abi.h, field by field."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("half_scales", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


class DenseCall(ctypes.Structure):
    """`DenseCall` of native/abi.h, field by field."""

    _fields_ = (
        ("w", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("w_stride", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class AttentionCall(ctypes.Structure):
    """`AttentionCall` of native/abi.h, field by field."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


class PrefillCall(ctypes.Structure):
    """`PrefillCall` of native/abi.h, field by field."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("q_row", ctypes.c_int64),
        ("q_head", ctypes.c_int64),
        ("q_position", ctypes.c_int64),
        ("k_row", ctypes.c_int64),
        ("k_head", ctypes.c_int64),
        ("k_position", ctypes.c_int64),
        ("v_row", ctypes.c_int64),
        ("v_head", ctypes.c_int64),
        ("v_position", ctypes.c_int64),
        ("out_row", ctypes.c_int64),
        ("out_head", ctypes.c_int64),
        ("out_position", ctypes.c_int64),
        ("causal", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


class StoreCall(ctypes.Structure):
    """`StoreCall` of native/abi.h, field by field."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("positions", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("k_position", ctypes.c_int64),
        ("k_head", ctypes.c_int64),
        ("v_position", ctypes.c_int64),
        ("v_head", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    )


class RowsCall(ctypes.Structure):
    """`RowsCall` of native/abi.h, field by field."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("offset", ctypes.c_double),
    )


class RotateCall(ctypes.Structure):
    """`RotateCall` of native/abi.h, field by field."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("x_row", ctypes.c_int64),
        ("x_head", ctypes.c_int64),
        ("x_position", ctypes.c_int64),
        ("y_row", ctypes.c_int64),
        ("y_head", ctypes.c_int64),
        ("y_position", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class Product(ctypes.Structure):
    """`Product` of native/abi.h, field by field."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("plain", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    )


class LayerCall(ctypes.Structure):
    """`LayerCall` of native/abi.h, field by field."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("attention_out_norm", ctypes.c_void_p),
        ("mlp_out_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("weight_only", ctypes.c_int64),
        ("gelu", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("norm_offset", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


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
    ):
        function = functions[f"lapilli_{name}"]
        function.argtypes = (pointer,)
        function.restype = None


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
