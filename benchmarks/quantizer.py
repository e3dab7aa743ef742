"""The quantizers of llama.cpp and of ik_llama.cpp, each its own: GGUF in floats to a kind.

python -m benchmarks.quantizer SOURCE TARGET Q4_K_M --threads 2     llama.cpp's, where it is
"""

import argparse
import ctypes
import importlib
import subprocess
from importlib.util import find_spec
from pathlib import Path


def is_known(kind: str) -> bool:
    """Return whether the llama.cpp of this environment makes a kind; False: it is not here."""
    if find_spec("llama_cpp") is None:
        return False
    return hasattr(importlib.import_module("llama_cpp"), f"LLAMA_FTYPE_MOSTLY_{kind}")


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Round by llama.cpp's quantizer.

    Args:
        source: a GGUF file in float16 or float32.
        target: that is written.
        kind: Q4_0, Q4_K_M ...
        threads: of the quantizer.

    Raises:
        SystemExit: it failed.
    """
    llama_cpp = importlib.import_module("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    paths = (str(source).encode(), str(target).encode())
    error = llama_cpp.llama_model_quantize(*paths, ctypes.byref(params))
    if error:
        raise SystemExit(f"llama.cpp could not quantize to {kind}: error {error}")


def run_quantizer(program: Path, source: Path, target: Path, kind: str, threads: int) -> None:
    """Round by ik_llama.cpp's llama-quantize.

    Args:
        program: its path.
        source: a GGUF file in float16 or float32.
        target: that is written.
        kind: those of llama.cpp, and IQ4_K, IQ4_KS ...
        threads: of the quantizer.

    Raises:
        SystemExit: it failed; the message is the end of what it said.
    """
    command = [str(program), str(source), str(target), kind, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program.name} could not make {kind}: {done.stderr[-1000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("kind")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    quantize(options.source, options.target, options.kind, options.threads)


if __name__ == "__main__":
    main()
