"""Runs cases in a child process: what they end with, how long they take and what they allocate.

    python -m tests.fuzz.run --cases 2000 --seed 3 [--kinds NAME] [--only KIND:INDEX]

A case is named "KIND:INDEX"; with the seed it is always the same. In the child every case has at
most SECONDS of processor time (and MINUTE on the clock, which finds what waits) and 1 GiB of
address space beyond what the honest folder takes; the kernel ends the child when a case exceeds
its time, the parent notes the case and starts another child behind it.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.damage import PLACES
from tests.fuzz.kind import Kind

SECONDS = 5
MINUTE = 60
MEMORY = 1 << 30
LONGEST = 2000  # characters of a message
OWN_FAULT = 99  # the exit code of a child that failed outside a case
PLACED = 0.08  # of the cases change what stands in the place of the file
ENDS = {signal.SIGPROF: f"more than {SECONDS} s", signal.SIGALRM: f"waits for {MINUTE} s"}


@dataclass(frozen=True)
class Fault:
    """A case that ended badly, and how."""

    case: str
    how: str

    def __str__(self) -> str:
        return f"{self.case}  {self.how}"


def run(kinds: Sequence[str], *, cases: int, seed: int, folder: Path) -> list[Fault]:
    """The faults of so many cases, spread over the kinds as the table says.

    Args:
        kinds: names of rows.
        cases: how many in all; every kind has at least one.
        seed: of the cases.
        folder: where honest folders are made, once.
    """
    return run_cases(_spread(kinds, cases), seed=seed, folder=folder)


def run_cases(todo: list[str], *, seed: int, folder: Path) -> list[Fault]:
    """The faults of these cases."""
    faults: list[Fault] = []
    while todo:
        done, last = 0, todo[0]
        for line in (child := _Child(todo, seed, folder)).lines():
            if line.startswith("{"):
                faults.append(Fault(**json.loads(line)))
            else:
                last, done = line, todo.index(line, done) + 1
        if child.end:
            faults.append(Fault(last, child.end))
        todo = todo[max(done, 1) :]
    return faults


class _Child:
    """One child process; `end` says why it ended before its time."""

    def __init__(self, cases: Sequence[str], seed: int, folder: Path) -> None:
        self.end = ""
        self._input = json.dumps({"cases": list(cases), "seed": seed, "folder": str(folder)})

    def lines(self) -> Iterator[str]:
        """A line at the start of every case, and one for every fault."""
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as said:
            given.write(self._input)
            given.seek(0)
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.run", "--child"],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**os.environ, **quiet},
                cwd=Path(__file__).parents[2],
            )
            with child:
                yield from (line.rstrip("\n") for line in child.stdout)
            if child.returncode:
                said.seek(0)
                if child.returncode == OWN_FAULT:
                    raise RuntimeError(said.read())
                end = ENDS.get(-child.returncode, f"the process ends with {child.returncode}")
                self.end = f"{end}: {said.read()[-300:].strip()}"


def _spread(kinds: Sequence[str], cases: int) -> list[str]:
    from tests.fuzz.table import KINDS

    shares = {kind.name: kind.share for kind in KINDS if kind.name in kinds}
    total = sum(shares.values())
    counts = {name: max(1, round(cases * share / total)) for name, share in shares.items()}
    return [f"{name}:{i}" for name, count in counts.items() for i in range(count)]


def _run_child() -> None:
    """Read cases from standard input, and run them."""
    given = json.loads(sys.stdin.read())
    warnings.simplefilter("error")  # what a library warns of reaches the user, too
    from tests.fuzz.table import KINDS

    kinds = {kind.name: kind for kind in KINDS}
    before = ""
    for case in given["cases"]:
        name = case.rpartition(":")[0]
        folder = Path(given["folder"]) / name.partition("/")[0]
        if name != before:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            before, honest = name, _honest(kinds[name], folder)
            kinds[name].read(folder)  # everything is imported and warm
            limit = _address_space() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        print(case, flush=True)
        how = _run_case(kinds[name], folder, honest, Random(f"{given['seed']}:{case}"))
        if how:
            print(json.dumps({"case": case, "how": how}), flush=True)


def _honest(kind: Kind, folder: Path) -> bytes:
    """The file of a kind, in a folder that is honest: made, or mended after a child was ended."""
    kept = folder / "honest"
    if not kept.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.make(folder)
        kept.mkdir()
    for file in kept.rglob("*.*"):
        _put(folder / file.relative_to(kept), file.read_bytes())
    content = (folder / kind.file).read_bytes()
    (kept / kind.file).parent.mkdir(parents=True, exist_ok=True)
    (kept / kind.file).write_bytes(content)
    return content


def _run_case(kind: Kind, folder: Path, honest: bytes, random: Random) -> str:
    """Damage the file, read the folder, mend the file; what was wrong, or nothing."""
    path = folder / kind.file
    path.unlink()
    if random.random() < PLACED:
        random.choice(PLACES)(path, random)
    else:
        path.write_bytes(random.choice(kind.damages)(honest, random))
    _limit(SECONDS, MINUTE)
    try:
        kind.read(folder)
    except kind.errors as error:
        text = str(error)
        return "" if len(text) <= LONGEST else f"{len(text)} characters: {text[:200]}"
    except BaseException as error:  # noqa: BLE001  whatever it is, it is looked for
        return _described(error)
    finally:
        _limit(0, 0)
        _put(path, honest)
    return ""


def _put(path: Path, content: bytes) -> None:
    """A file of its own: whoever has mapped the old one keeps that."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _limit(processor: int, clock: int) -> None:
    """Both timers end the process when nobody handles their signals, whatever it is doing."""
    signal.setitimer(signal.ITIMER_PROF, processor)
    signal.setitimer(signal.ITIMER_REAL, clock)


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/src/lapilli/" in frame.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="part of the names of the kinds")
    parser.add_argument("--only", help="one case, as KIND:INDEX")
    parser.add_argument("--folder", type=Path, help="where honest folders are kept")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        try:
            _run_child()
        except Exception:  # noqa: BLE001  whatever it is, it is the fuzzer's own fault
            traceback.print_exc()
            sys.exit(OWN_FAULT)
        return
    from tests.fuzz.table import KINDS

    names = [kind.name for kind in KINDS if options.kinds in kind.name]
    cases = [options.only] if options.only else _spread(names, options.cases)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        faults = run_cases(cases, seed=options.seed, folder=folder)
    print("\n".join(map(str, faults)))
    print(f"{len(faults)} of {len(cases)} cases end badly")


if __name__ == "__main__":
    main()
