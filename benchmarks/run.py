"""`make bench`: lapilli and its peers on random weights of real shape, each in its own process.

    python -m benchmarks.run --shape S --rounds 3 --peers-python PEERS/bin/python
    python -m benchmarks.run --shape tiny --rounds 1 --engines lapilli     seconds: does it run

Rounds go A B C A B C, so that what disturbs the machine disturbs all. What each process found is
written at once (results/raw); --resume goes on where a run was cut off. The report is
benchmarks/results/inference-SHAPE.{json,md,svg}.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.contest import LOADING, Engine, chosen, make_files, remove_files
from benchmarks.machine import (
    RESULTS,
    ROOT,
    ChildError,
    machine,
    package_version,
    run_child,
    start_up,
)
from benchmarks.report import write_report

PEERS = ROOT / ".venv-peers" / "bin" / "python"  # see README.md
IK = ROOT / ".ik" / "bin"
POINTS = {
    "positions": [256, 512, 1024, 2048, 4096],
    "batch": [1, 2, 4, 8, 16],
    "pictures": [1, 2, 4, 8],
}
TINY_POINTS = {"positions": [256, 512], "batch": [1, 4], "pictures": [1, 2]}
GROWS = {"positions": ("lapilli int4", "llama.cpp Q4_0"), "batch": ("lapilli int4",)}
GROWS["pictures"] = GROWS["batch"]


class Notes:
    """What was found so far, on disk after every process.

    Args:
        path: of the file.
        settings: what figures can be compared under.
        resume: go on with what is there.

    Raises:
        SystemExit: what is there was measured under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.found: dict[str, Any] = {"settings": settings, "done": {}, "failed": {}}
        if resume and path.exists():
            self.found = json.loads(path.read_text())
            if self.found["settings"] != settings:
                raise SystemExit(f"{path} has other settings: {self.found['settings']}")
        self.found["failed"] = {}

    def run(self, name: str, python: str, arguments: list[str]) -> None:
        """One process, if it has not been run yet."""
        if name in self.found["done"]:
            return
        started = time.perf_counter()
        try:
            self.found["done"][name] = run_child(python, arguments)
            said = "done"
        except ChildError as error:
            self.found["failed"][name] = str(error)
            said = f"failed: {error}"
        print(f"{name}: {said}, {time.perf_counter() - started:.1f} s", file=sys.stderr)
        self.write()

    def write(self) -> None:
        """To disk, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(self.found, indent=1))
        aside.replace(self.path)


def run_rounds(notes: Notes, engines: list[Engine], folder: Path, wanted: Any) -> None:
    """The machine's limits, then every engine, again and again."""
    plain = ["--threads", str(wanted.threads), "--new-tokens", str(wanted.new_tokens)]
    often = [*plain, "--repeats", str(wanted.repeats)]
    for turn in range(wanted.rounds):
        quick = ["--quick"] if wanted.shape == "tiny" else []
        notes.run(f"limits/{turn}", sys.executable, ["limits", *plain[:2], *quick])
        for engine in engines:
            python = wanted.peers_python if engine.is_peer else sys.executable
            many = 0 if engine.is_slow and turn else wanted.many
            repeats = [*plain, "--repeats", "1"] if engine.is_slow else often
            arguments = [
                "figures",
                *engine.arguments(folder, wanted.ik),
                *repeats,
                "--many",
                str(many),
            ]
            notes.run(f"figures/{engine.name}/{turn}", python, arguments)
        if not turn and any(engine.name == "lapilli int4" for engine in engines):
            arguments = ["figures", *LOADING.arguments(folder), *often, "--many", "0"]
            notes.run(f"loading/{LOADING.name}/0", sys.executable, arguments)


def run_growth(notes: Notes, engines: list[Engine], folder: Path, wanted: Any) -> None:
    """How cost grows, and what prompt lookup gains."""
    points = TINY_POINTS if wanted.shape == "tiny" else POINTS
    for task, names in GROWS.items():
        for engine in engines:
            if engine.name in names:
                at = [str(point) for point in points[task]]
                python = wanted.peers_python if engine.is_peer else sys.executable
                arguments = [task, *engine.arguments(folder), "--threads", str(wanted.threads)]
                notes.run(f"{task}/{engine.name}", python, [*arguments, "--at", *at])
    for engine in engines:
        if engine.name == "lapilli int4":
            arguments = ["lookup", *engine.arguments(folder), "--threads", str(wanted.threads)]
            notes.run("lookup", sys.executable, arguments)


def run_quality(notes: Notes, wanted: Any) -> None:
    """Measure what the formats cost in quality (quality.py), in a process of its own.

    With shape S alone: the model is the same for every shape.
    """
    arguments = ["--peers-python", wanted.peers_python, "--threads", str(wanted.threads)]
    arguments += ["--folder", str(wanted.folder / "lapilli-bench-quality")]
    arguments += ["--out", str(wanted.out), *(["--resume"] if wanted.resume else [])]
    arguments += [] if wanted.ik is None else ["--ik", str(wanted.ik)]
    command = [sys.executable, "-m", "benchmarks.quality", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        notes.found["failed"]["quality"] = f"benchmarks.quality ended with {done.returncode}"


def read_quality(notes: Notes, folder: Path) -> None:
    """Take along what is known of the formats' quality."""
    path = folder / "quality.json"
    if path.exists():
        notes.found["quality"] = json.loads(path.read_text())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="S", choices=("tiny", "S", "L"))
    parser.add_argument(
        "--engines", default="", help="beginnings of names, by comma: 'lapilli int4,llama.cpp'"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="answers per process")
    parser.add_argument("--many", type=int, default=8, help="requests at the same time")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers-python", default=str(PEERS if PEERS.exists() else sys.executable))
    parser.add_argument(
        "--ik", type=Path, default=IK if IK.exists() else None, help="ik_llama.cpp's programs"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="leave the models where they are")
    parser.add_argument("--resume", action="store_true", help="go on where a run was cut off")
    parser.add_argument("--no-growth", action="store_true", help="the table alone")
    parser.add_argument("--no-quality", action="store_true", help="of formats: not measured anew")
    parser.add_argument("--only-report", action="store_true", help="write it again")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    wanted = parse(arguments)
    names = [name.strip() for name in wanted.engines.split(",") if name.strip()]
    engines, skipped = chosen(names, wanted.shape, sys.executable, wanted.peers_python, wanted.ik)
    settings = {
        "shape": wanted.shape,
        "threads": wanted.threads,
        "new_tokens": wanted.new_tokens,
        "repeats": wanted.repeats,
        "many": wanted.many,
    }
    name = f"inference-{wanted.shape}"
    resume = wanted.resume or wanted.only_report
    notes = Notes(wanted.out / "raw" / f"{name}.json", settings, resume=resume)
    if not wanted.only_report:
        measure(notes, engines, skipped, wanted)
        if wanted.shape == "S" and not wanted.no_quality:
            run_quality(notes, wanted)
    read_quality(notes, wanted.out)
    print(write_report(notes.found, wanted.out, name))


def measure(notes: Notes, engines: list[Engine], skipped: dict, wanted: Any) -> None:
    """Files, rounds, growth."""
    folder = wanted.folder / f"lapilli-bench-models-{wanted.shape}"
    peers = {"llama_cpp_python", "openvino-genai"}
    notes.found |= {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": machine(),
        "peers": {name: package_version(wanted.peers_python, name) for name in sorted(peers)},
        "programs": sorted(engine.name for engine in engines if engine.is_program),
        "skipped": skipped,
        "rounds": wanted.rounds,
    }
    try:
        make_files(folder, wanted.shape, engines, wanted.peers_python, wanted.threads, wanted.ik)
        weights = (folder / "float").glob("*.safetensors")
        notes.found["float_bytes"] = sum(file.stat().st_size for file in weights)
        notes.found["config"] = json.loads((folder / "float" / "config.json").read_text())
        notes.write()
        run_rounds(notes, engines, folder, wanted)
        if not wanted.no_growth:
            run_growth(notes, engines, folder, wanted)
            notes.found["start_up"] = start_up(2 if wanted.shape == "tiny" else 5)
        notes.found["load_average_after"] = os.getloadavg()[0]
        notes.write()
    finally:
        if not wanted.keep:
            remove_files(folder)


if __name__ == "__main__":
    main()
