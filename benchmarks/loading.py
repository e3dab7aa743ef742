"""How long loading takes beside reading the same files: pairs, each in a process of its own.

    .venv/bin/python -m benchmarks.loading --rounds 9

A process reads the files, loads the checkpoint, and reads the files again; both readings count.
Pairs that lie close together are disturbed alike, so the median of their ratios says more than two
medians on a machine that does other things. Writes benchmarks/results/loading.json.
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

from benchmarks.machine import RESULTS, ROOT, machine, read_s


def one_pair(checkpoint: Path, dtype: str, threads: int) -> dict[str, float]:
    """Seconds of imports, reading and loading in this process."""
    import torch

    torch.set_num_threads(threads)
    started = time.perf_counter()
    from lapilli.checkpoint.load import load_checkpoint

    import_s = time.perf_counter() - started
    before = read_s(checkpoint)
    started, cpu = time.perf_counter(), time.process_time()
    loaded = load_checkpoint(checkpoint, device="cpu", dtype=dtype)
    load_s, load_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    read = (before + read_s(checkpoint)) / 2
    del loaded
    return {"import_s": import_s, "read_s": read, "load_s": load_s, "load_cpu_s": load_cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S", choices=("tiny", "S", "L"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--pair", action="store_true", help="one pair, in this process")
    wanted = parser.parse_args()
    checkpoint = wanted.folder / f"lapilli-bench-{wanted.shape}-{wanted.dtype}"
    if wanted.pair:
        print(json.dumps(one_pair(checkpoint, wanted.dtype, wanted.threads)))
        return
    from benchmarks.checkpoint import write_checkpoint

    write_checkpoint(wanted.shape, checkpoint)
    command = [sys.executable, "-m", "benchmarks.loading", "--pair", *sys.argv[1:]]
    rows: list[dict[str, float]] = []
    for _ in range(wanted.rounds):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    ratios = [row["load_s"] / row["read_s"] for row in rows]
    with_imports = [(row["import_s"] + row["load_s"]) / row["read_s"] for row in rows]
    results = {
        "shape": wanted.shape,
        "dtype": wanted.dtype,
        "threads": wanted.threads,
        "rounds": wanted.rounds,
        "load_average": os.getloadavg()[0],
        "machine": machine(),
        "weight_bytes": sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")),
        "medians": {key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "load over read": statistics.median(ratios),
        "load over read, quartiles": statistics.quantiles(ratios, n=4),
        "imports and load over read": statistics.median(with_imports),
    }
    RESULTS.mkdir(exist_ok=True)
    name = "loading" if wanted.shape == "S" else f"loading-{wanted.shape}"
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
