"""Who takes part: engines, what they need, and which files are made for them."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.checkpoint import write_checkpoint, write_quantized
from benchmarks.machine import ROOT, package_version

DTYPES = {"tiny": torch.float32, "S": torch.float32, "L": torch.bfloat16}
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
        is_peer: runs in the peers' environment.
        is_slow: gives one answer per process, and eight at once in the first round only.
    """

    name: str
    module: str
    kind: str
    package: str
    arithmetic: str
    is_peer: bool = False
    is_slow: bool = False

    def arguments(self, files: Path) -> list[str]:
        """Of benchmarks.child."""
        return [self.module, str(files), "--kind", self.kind]


# Flash attention, llama.cpp's own choice, reads prompts faster and decodes slower on some CPUs:
# both are measured, and ratios are taken against whichever is better.
ENGINES = (
    Engine("lapilli int4", "lapilli", "int4", "lapilli", "int8"),
    Engine("llama.cpp Q4_0", "llamacpp", "Q4_0", "llama_cpp_python", "int8", is_peer=True),
    Engine(
        "llama.cpp Q4_0, no flash attention",
        "llamacpp",
        "Q4_0-noflash",
        "llama_cpp_python",
        "int8",
        is_peer=True,
        is_slow=True,
    ),
    Engine(
        "OpenVINO GenAI Q4_0, text alone",
        "openvino",
        "Q4_0",
        "openvino-genai",
        "int8",
        is_peer=True,
        is_slow=True,
    ),
    Engine("lapilli int8", "lapilli", "int8", "lapilli", "int8", is_slow=True),
    Engine(
        "llama.cpp Q4_K_M",
        "llamacpp",
        "Q4_K_M",
        "llama_cpp_python",
        "int8",
        is_peer=True,
        is_slow=True,
    ),
    Engine(
        "llama.cpp Q8_0",
        "llamacpp",
        "Q8_0",
        "llama_cpp_python",
        "int8",
        is_peer=True,
        is_slow=True,
    ),
    Engine("lapilli float32", "lapilli", "float32", "lapilli", "float32", is_slow=True),
    Engine(
        "transformers float32",
        "transformers",
        "float32",
        "transformers",
        "float32",
        is_slow=True,
    ),
    Engine(
        "transformers bfloat16",
        "transformers",
        "bfloat16",
        "transformers",
        "bfloat16",
        is_slow=True,
    ),
)
# Rounding while reading: measured once, for its time and its memory.
LOADING = Engine(
    "lapilli int4, rounded while loading", "lapilli", "int4-loading", "lapilli", "int8"
)


def chosen(names: list[str], shape: str, python: str, peers: str) -> tuple[list[Engine], dict]:
    """Engines that can run, and why the others cannot.

    Args:
        names: beginnings of names; none: all.
        shape: of the model.
        python: of this environment.
        peers: of the peers' environment.
    """
    found, skipped = [], {}
    for engine in ENGINES:
        if names and not any(engine.name.startswith(name) for name in names):
            skipped[engine.name] = "not asked for"
        elif package_version(peers if engine.is_peer else python, engine.package) is None:
            skipped[engine.name] = f"{engine.package} is not installed"
        elif shape == "L" and engine.kind == "float32":
            skipped[engine.name] = TOO_LARGE
        else:
            found.append(engine)
    return found, skipped


def make_files(folder: Path, shape: str, engines: list[Engine], peers: str, threads: int) -> None:
    """The checkpoint, and what engines make of it with their own tools."""
    source = write_checkpoint(shape, folder / "float", dtype=DTYPES[shape])
    kinds = {engine.kind.partition("-")[0] for engine in engines if engine.is_peer}
    if kinds:
        command = [peers, "-m", "benchmarks.gguf_files", str(source), str(folder / "gguf")]
        command += [*sorted(kinds), "--threads", str(threads)]
        environment = {"PYTHONPATH": str(ROOT), "PATH": str(Path(peers).parent)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"writing GGUF files failed: {done.stderr[-1000:]}")
    for bits in (4, 8):
        if any(engine.kind == f"int{bits}" for engine in engines):
            print(f"rounding to {bits} bits", file=sys.stderr)
            write_quantized(source, folder / f"int{bits}", bits)


def remove_files(folder: Path) -> None:
    """Everything that make_files wrote."""
    shutil.rmtree(folder, ignore_errors=True)
