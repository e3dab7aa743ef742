"""Who takes part: engines, what they need, and which files are made for them."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.checkpoint import write_checkpoint, write_quantized
from benchmarks.machine import package_version, run_peer

DTYPES = {"tiny": torch.float32, "S": torch.float32, "L": torch.bfloat16}
PROGRAMS = ("llama-bench", "llama-quantize")
"""Of ik_llama.cpp, that speed is measured with."""
TOO_LARGE = "27 GB of weights: does not fit into the memory"


@dataclass(frozen=True, slots=True)
class Engine:
    """One row of the table.

    Attributes:
        name: how the table calls it.
        module: in benchmarks/engines.
        kind: number format, in the engine's own words.
        package: that must be installed.
        arithmetic: the machine's limit that its prefill is compared with.
        format: of the weights, as quality.py names it; "": as good as the float32 they come from.
        is_peer: runs in the peers' environment.
        is_program: no package: a folder of programs (`--ik`).
        is_slow: gives one answer per process, and eight at once in the first round only.
    """

    name: str
    module: str
    kind: str
    package: str
    arithmetic: str
    format: str = ""
    is_peer: bool = False
    is_program: bool = False
    is_slow: bool = False

    @property
    def gguf_kind(self) -> str | None:
        """The kind of GGUF file that it reads; None: it reads other files."""
        return self.kind.partition("-")[0] if self.is_peer or self.is_program else None

    def arguments(self, files: Path, programs: Path | None = None) -> list[str]:
        """Of benchmarks.child.

        Args:
            files: the folder of the shape.
            programs: the folder of programs, for an engine that is one.
        """
        arguments = [self.module, str(files), "--kind", self.kind]
        return [*arguments, "--ik", str(programs)] if self.is_program else arguments


def _llama(name: str, kind: str, *, is_slow: bool = True) -> Engine:
    return Engine(
        f"llama.cpp {name}",
        "llamacpp",
        kind,
        "llama_cpp_python",
        "int8",
        f"llama.cpp {kind.partition('-')[0]}",
        is_peer=True,
        is_slow=is_slow,
    )


def _ik(kind: str) -> Engine:
    name = f"ik_llama.cpp {kind}"
    return Engine(f"{name}, text alone", "ik", kind, "ik_llama.cpp", "int8", name, is_program=True)


def _own(kind: str, *, is_slow: bool = True) -> Engine:
    is_float = kind == "float32"
    return Engine(
        f"lapilli {kind}",
        "lapilli",
        kind,
        "lapilli",
        kind if is_float else "int8",
        "" if is_float else f"lapilli {kind}",
        is_slow=is_slow,
    )


def _transformers(kind: str) -> Engine:
    return Engine(f"transformers {kind}", "transformers", kind, "transformers", kind, is_slow=True)


# Flash attention, llama.cpp's own choice, reads prompts faster and decodes slower on some CPUs:
# both are measured, and ratios are taken against whichever is better.
ENGINES = (
    _own("int4", is_slow=False),
    _ik("Q4_0"),
    _llama("Q4_0", "Q4_0", is_slow=False),
    _ik("Q4_K_M"),
    _llama("Q4_0, no flash attention", "Q4_0-noflash"),
    _ik("IQ4_KS"),
    Engine(
        "OpenVINO GenAI Q4_0, text alone",
        "openvino",
        "Q4_0",
        "openvino-genai",
        "int8",
        "llama.cpp Q4_0",
        is_peer=True,
        is_slow=True,
    ),
    _ik("IQ4_K"),
    _own("int8"),
    _llama("Q4_K_M", "Q4_K_M"),
    _llama("Q8_0", "Q8_0"),
    _own("float32"),
    _transformers("float32"),
    _transformers("bfloat16"),
)
# Rounding while reading: measured once, for its time and its memory.
LOADING = Engine(
    "lapilli int4, rounded while loading",
    "lapilli",
    "int4-loading",
    "lapilli",
    "int8",
    "lapilli int4",
)


def chosen(
    names: list[str], shape: str, python: str, peers: str, programs: Path | None = None
) -> tuple[list[Engine], dict[str, str]]:
    """Engines that can run, and why the others cannot.

    Args:
        names: beginnings of names; none: all.
        shape: of the model.
        python: of this environment.
        peers: of the peers' environment.
        programs: the folder of ik_llama.cpp's programs.
    """
    found: list[Engine] = []
    skipped: dict[str, str] = {}
    for engine in ENGINES:
        if names and not any(engine.name.startswith(name) for name in names):
            why: str | None = "not asked for"
        elif shape == "L" and engine.kind == "float32":
            why = TOO_LARGE
        else:
            why = _missing(engine, python, peers, programs)
        if why is None:
            found.append(engine)
        else:
            skipped[engine.name] = why
    return found, skipped


def _missing(engine: Engine, python: str, peers: str, programs: Path | None) -> str | None:
    """What an engine needs and has not; None: it can run."""
    if engine.is_program:
        absent = [name for name in PROGRAMS if programs is None or not (programs / name).is_file()]
        if absent:
            place = "--ik names no folder" if programs is None else f"{programs} has no {absent[0]}"
            return f"{engine.package} is not built: {place}"
        # Its files are written with the package gguf.
        return None if package_version(peers, "gguf") else "gguf is not installed"
    if package_version(peers if engine.is_peer else python, engine.package) is None:
        return f"{engine.package} is not installed"
    return None


def make_files(
    folder: Path,
    shape: str,
    engines: list[Engine],
    peers: str,
    threads: int,
    programs: Path | None = None,
) -> None:
    """The checkpoint, and what engines make of it with their own tools."""
    source = write_checkpoint(shape, folder / "float", dtype=DTYPES[shape])
    kinds = {engine.gguf_kind for engine in engines if engine.gguf_kind is not None}
    if kinds:
        arguments = [str(source), str(folder / "gguf"), *sorted(kinds), "--threads", str(threads)]
        if programs is not None:
            arguments += ["--quantizer", str(programs / "llama-quantize")]
        run_peer(peers, "benchmarks.gguf_files", *arguments)
    for bits in (4, 8):
        if any(engine.kind == f"int{bits}" for engine in engines):
            print(f"rounding to {bits} bits", file=sys.stderr)
            write_quantized(source, folder / f"int{bits}", bits)


def remove_files(folder: Path) -> None:
    """Everything that make_files wrote."""
    shutil.rmtree(folder, ignore_errors=True)
