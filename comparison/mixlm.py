"""MixLM's claims, measured at a small size on two cores: `python -m comparison.mixlm`.

    part 1  a generated shop, whose best order is known     comparison/shop.py
    part 2  Cranfield, judged by people                     comparison/cranfield.py

Writes comparison/results/mixlm.json after every part; mixlm_report.py writes docs/mixlm.md of it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from comparison.language_model import Sizes
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
    mixed=_QUICK,
    towers=_QUICK,
    summaries=_QUICK,
    ablation=_QUICK,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m comparison.mixlm", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--validation", action="store_true", help="score validation, not the test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}

    def save(name: str, part: Mapping[str, Any]) -> None:
        found[name] = part
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    plan = QUICK_SHOP if options.quick else ShopPlan(seed=options.seed)
    test = 0 if options.validation else 1
    with tempfile.TemporaryDirectory(prefix="lapilli-mixlm-") as folder:
        started = time.process_time()
        part = ShopComparison(plan, Path(folder), lambda one: save("shop", one), test=test).run()
        part["seconds"]["all"] = time.process_time() - started
        save("shop", part)


if __name__ == "__main__":
    main()
