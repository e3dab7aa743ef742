"""`make bench`: lapilli beside transformers on random weights of real shape, figures as ratios.

The engines run in processes of their own, one after the other in turns (A B A B), so that what
disturbs the machine disturbs both. Writes benchmarks/results/inference.{json,md}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
ENGINES = ("lapilli", "transformers")


def child(engine: str, checkpoint: Path, options: list[str]) -> dict[str, Any]:
    """The figures of one process."""
    command = [sys.executable, "-m", "benchmarks.child", engine, str(checkpoint), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(command: list[str], repeats: int) -> float:
    """Median wall time of a whole process."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_s(checkpoint: Path) -> float:
    """Seconds to read the weight files when they are warm: the floor of loading.

    Into one small buffer again and again: memory for the whole file would cost several times more
    to get than to fill, and a loader that maps the files needs none.
    """
    buffer = bytearray(1 << 24)
    started = time.perf_counter()
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    cpu = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.open() if "model name" in x), cpu)
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def median(rows: list[dict[str, Any]], key: str) -> float:
    """Median of one figure over the processes of one engine."""
    return statistics.median(row[key] for row in rows)


def compare(checkpoint: Path, options: list[str], rounds: int) -> dict[str, Any]:
    """Every figure of both engines, their ratios, and the limits next to them."""
    rows: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    reads = []
    for turn in range(rounds):
        for engine in ENGINES:
            reads.append(read_s(checkpoint))
            rows[engine].append(child(engine, checkpoint, options))
            print(f"round {turn + 1}: {rows[engine][-1]}", file=sys.stderr)
    weight_bytes = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    figures: dict[str, Any] = {
        "weight_bytes": weight_bytes,
        "read_warm_s": statistics.median(reads),
        "engines": {
            engine: {key: median(rows[engine], key) for key in rows[engine][0] if key != "engine"}
            for engine in ENGINES
        },
    }
    ours, theirs = (figures["engines"][engine] for engine in ENGINES)
    figures["ratios"] = {
        "first token, times faster than transformers": theirs["first_token_s"]
        / ours["first_token_s"],
        "decode, times the rate of transformers": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "load, seconds per second of reading the files": ours["load_s"] / figures["read_warm_s"],
        "imports and load, seconds per second of reading the files": (
            (ours["import_s"] + ours["load_s"]) / figures["read_warm_s"]
        ),
        "peak memory above the imports, per byte of weights": (
            (ours["peak_bytes"] - ours["start_bytes"]) / weight_bytes
        ),
    }
    return figures


def start_up(repeats: int) -> dict[str, float]:
    """`lapilli ask` on pebble against `import torch`, whole processes."""
    picture = str(ROOT / "examples" / "picture.png")
    program = str(Path(sys.executable).parent / "lapilli")
    torch_s = seconds_of([sys.executable, "-c", "import torch"], repeats)
    ask_s = seconds_of([program, "ask", "What is in this picture?", picture], repeats)
    help_s = seconds_of([program, "--help"], repeats)
    return {"import_torch_s": torch_s, "ask_s": ask_s, "more_s": ask_s - torch_s, "help_s": help_s}


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"# Inference, shape {results['shape']}, {results['dtype']}, {results['threads']} threads",
        "",
        f"{results['machine']['cpu']} ({results['machine']['capability']}, "
        f"{results['machine']['cores']} cores), torch {results['machine']['torch']}, "
        f"transformers {results['machine']['transformers']}. 576 visual and 40 text positions, "
        f"{results['new_tokens']} new tokens; medians of {results['rounds']} processes each, "
        "in turns.",
        "",
        "| engine | imports s | load s | first token s | decode tokens/s | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for engine, row in results["figures"]["engines"].items():
        cells = [row["import_s"], row["load_s"], row["first_token_s"], row["tokens_per_s"]]
        cells.append(row["peak_bytes"] / 2**30)
        lines.append(f"| {engine} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    lines += ["", "| ratio | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in results["figures"]["ratios"].items()]
    lines += ["", "| whole process | s |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in results["start_up"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S", choices=("tiny", "S", "L"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    wanted = parser.parse_args()
    checkpoint = write_checkpoint(
        wanted.shape, wanted.folder / f"lapilli-bench-{wanted.shape}-{wanted.dtype}"
    )
    options = ["--dtype", wanted.dtype, "--threads", str(wanted.threads)]
    options += ["--new-tokens", str(wanted.new_tokens), "--repeats", str(wanted.repeats)]
    results = {
        "shape": wanted.shape,
        "dtype": wanted.dtype,
        "threads": wanted.threads,
        "rounds": wanted.rounds,
        "new_tokens": wanted.new_tokens,
        "machine": machine(),
        "figures": compare(checkpoint, options, wanted.rounds),
        "start_up": start_up(5),
    }
    RESULTS.mkdir(exist_ok=True)
    name = "inference" if wanted.shape == "S" else f"inference-{wanted.shape}"
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
