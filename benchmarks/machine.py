"""The machine and the processes on it: what figures belong to, and how a child is run."""

import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


class ChildError(RuntimeError):
    """A process that did not end well."""


def run_child(python: str, arguments: list[str], *, timeout: float = 3600) -> dict[str, Any]:
    """The figures that one process printed.

    Raises:
        ChildError: it failed; the message is the end of what it said.
    """
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [python, "-m", "benchmarks.child", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"not ready after {timeout:.0f} s") from error
    if done.returncode:
        raise ChildError(" ".join(done.stderr[-400:].split()) or f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run_peer(peers: str, module: str, *arguments: str) -> None:
    """Run a module of ours in the peers' environment, which has none of our packages.

    Raises:
        SystemExit: it failed; the message is the end of what it said.
    """
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(Path(peers).parent)}
    done = subprocess.run(
        [peers, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} failed: {done.stderr[-1000:]}")


def package_version(python: str, package: str) -> str | None:
    """The version that an environment has of a package."""
    if python == sys.executable:
        try:
            return version(package)
        except PackageNotFoundError:
            return None
    program = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    facts: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in lines}
    features = facts.get("flags", "").split()
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": facts.get("model name", "unknown"),
        "family and model": f"{facts.get('cpu family', '?')} {facts.get('model', '?')}",
        "features": [name for name in known if name in features],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def read_s(folder: Path) -> float:
    """Seconds to read the weight files when they are warm: the floor of loading.

    Into one small buffer again and again: memory for the whole file would cost several times more
    to get than to fill, and a loader that maps the files needs none.
    """
    buffer = bytearray(1 << 24)
    started = time.perf_counter()
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def seconds_of(command: list[str], repeats: int) -> float:
    """Median wall time of a whole process."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def start_up(repeats: int) -> dict[str, float]:
    """`lapilli ask` on pebble against `import torch`, whole processes."""
    picture = str(ROOT / "examples" / "picture.png")
    program = str(Path(sys.executable).parent / "lapilli")
    torch_s = seconds_of([sys.executable, "-c", "import torch"], repeats)
    ask_s = seconds_of([program, "ask", "What is in this picture?", picture], repeats)
    help_s = seconds_of([program, "--help"], repeats)
    return {"import_torch_s": torch_s, "ask_s": ask_s, "more_s": ask_s - torch_s, "help_s": help_s}
