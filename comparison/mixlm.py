"""MixLM's claims, measured at a small size on two cores: `python -m comparison.mixlm`.

    part 1  a generated shop, whose best order is known     comparison/shop.py
    part 2  Cranfield, judged by people                     comparison/cranfield.py

Writes comparison/results/mixlm.json after every part; mixlm_report.py writes docs/mixlm.md of it.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from comparison.cranfield import CranfieldComparison, CranfieldPlan, read_cranfield
from comparison.language_model import Sizes
from comparison.mixlm_report import tables
from comparison.rankers import Course
from comparison.shop import ShopComparison, ShopPlan

Save = Callable[[Mapping[str, Any]], None]
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
    mixed=_QUICK,
    towers=_QUICK,
    words=_QUICK,
    ablation=_QUICK,
)


QUICK_CRANFIELD: Final = CranfieldPlan(
    sizes=Sizes(vocabulary=400, width=32, inner=48, layers=1, heads=2),
    meanings=8,
    validation=200,
    reasoning=_QUICK,
    text=_QUICK,
    mixed=_QUICK,
)
PARTS: Final = ("shop", "cranfield")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m comparison.mixlm", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--validation", action="store_true", help="score validation, not the test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablations", action="store_true", help="stage III without its parts too")
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and go on from them")
    parser.add_argument("--part", choices=PARTS, help="one part; None: both")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if options.out.exists() and options.part:  # the other part stays
        found = json.loads(options.out.read_text(encoding="utf-8"))

    def save(name: str, part: Mapping[str, Any]) -> None:
        found[name] = part
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for name in PARTS if options.part is None else (options.part,):
        measure = measure_shop if name == "shop" else measure_cranfield
        with tempfile.TemporaryDirectory(prefix="lapilli-mixlm-") as scratch:
            folder = Path(scratch) if options.work is None else options.work / name
            part = measure(options, folder, partial(save, name))
        if part is not None:
            save(name, part)
    sys.stdout.write(tables(found))


def measure_shop(options: argparse.Namespace, folder: Path, save: Save) -> dict[str, Any]:
    """Return what is found of the generated shop."""
    plan = QUICK_SHOP if options.quick else ShopPlan(seed=options.seed)
    test = 0 if options.validation else 1
    return ShopComparison(plan, folder, save, test=test).run(ablations=options.ablations)


def measure_cranfield(
    options: argparse.Namespace, folder: Path, save: Save
) -> dict[str, Any] | None:
    """Return what is found of Cranfield, or say where it is to be had."""
    data = options.data / "cranfield"
    if not (data / "cran.all.1400").is_file():
        sys.stderr.write(
            f"{data} has no Cranfield: put cran.all.1400, cran.qry and cranqrel of the test "
            "collection there (--data names the folder above); this part is left out\n"
        )
        return None
    plan = QUICK_CRANFIELD if options.quick else CranfieldPlan(seed=options.seed)
    return CranfieldComparison(read_cranfield(data), plan, folder, save).run()


def data_folder() -> Path:
    """Return where real data lie unless --data says it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("LAPILLI_DATA", beside))


if __name__ == "__main__":
    main()
