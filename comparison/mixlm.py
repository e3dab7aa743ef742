"""MixLM's claims, measured at a small size on two cores: `python -m comparison.mixlm`.

    a generated shop, whose best order is known     comparison/shop.py

Writes comparison/results/mixlm.json after every row; mixlm_report.py writes docs/mixlm.md of it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from comparison.language_model import Sizes
from comparison.mixlm_report import tables
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m comparison.mixlm", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--validation", action="store_true", help="score the draw for choices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablations", action="store_true", help="stage III with other parts too")
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and go on from them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    part = "validation" if options.validation else "shop"
    found: dict[str, Any] = {}
    if options.out.exists():  # the other draw's figures stay
        found = json.loads(options.out.read_text(encoding="utf-8"))

    def save(shop: Mapping[str, Any]) -> None:
        found[part] = shop
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    plan = QUICK_SHOP if options.quick else ShopPlan(seed=options.seed)
    test = 0 if options.validation else 1
    with tempfile.TemporaryDirectory(prefix="lapilli-mixlm-") as scratch:
        folder = options.work or Path(scratch)
        save(ShopComparison(plan, folder, save, test=test).run(ablations=options.ablations))
    sys.stdout.write(tables(found[part]))


if __name__ == "__main__":
    main()
