"""Compare with the original's numbers and print a table.

python -m tests.conformance [--set S] [--variant V] [--op O] [--case ID] [--json FILE]
                            [--processes N]
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from tests.conformance.run import Selection, run_directory
from tests.conformance.table import as_json, render

REPOSITORY = Path(__file__).resolve().parents[2]


def find_root() -> Path:
    """LAPILLI_CONFORMANCE, ../shared/conformance, or the copy in tests/golden."""
    named = os.environ.get("LAPILLI_CONFORMANCE")
    if named:
        return Path(named)
    shared = REPOSITORY.parent / "shared" / "conformance"
    return shared if (shared / "cases").is_dir() else REPOSITORY / "tests/golden/conformance"


def main(arguments: list[str]) -> int:
    """Run the chosen cases, print the table, and return 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    for name in ("set", "variant", "op", "case"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--json", type=Path, help="also write every result to this file")
    parser.add_argument("--root", type=Path, default=find_root())
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--processes", type=int, default=1, help="that share the variants")
    args = parser.parse_args(arguments)
    if not (args.root / "cases").is_dir():
        parser.error(f"{args.root} has no cases/: set LAPILLI_CONFORMANCE or --root")
    torch.set_num_threads(args.threads)
    chosen = Selection(tuple(args.set), tuple(args.variant), tuple(args.op), tuple(args.case))
    with tempfile.TemporaryDirectory(prefix="lapilli-conformance-") as scratch:
        results = list(run_directory(args.root.resolve(), Path(scratch), chosen, args.processes))
    if not results:
        print("no case was chosen")
        return 1
    print(render(results))
    if args.json:
        args.json.write_text(as_json(results), encoding="utf-8")
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
