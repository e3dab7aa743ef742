"""python -m tests.golden.refresh CONFORMANCE: copies golden cases into tests/golden/conformance.

Everything but photographs: cases that show one are skipped where it is not there, and the stored
pixels of such cases are left out too.
"""

import argparse
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PHOTOGRAPH = "extreme_ironing"
PIXELS = "u8"
HERE = Path(__file__).parent / "conformance"


def shows_photograph(case: dict[str, Any]) -> bool:
    """Whether a case reads a photograph."""
    return PHOTOGRAPH in json.dumps(case["input"])


def copy_variant(source: Path, target: Path) -> None:
    """One directory of cases, without the pixels of photographs."""
    target.mkdir(parents=True, exist_ok=True)
    if (source / "spec.json").exists():
        shutil.copyfile(source / "spec.json", target / "spec.json")
    content = json.loads((source / "cases.json").read_text(encoding="utf-8"))
    dropped = set()
    for case in content["cases"]:
        if shows_photograph(case) and PIXELS in case["arrays"]:
            case["arrays"].remove(PIXELS)
            dropped.add(f"{case['id']}/{PIXELS}")
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in content["cases"])
    text = f'{{"variant": {json.dumps(content["variant"])}, "cases": [\n{lines}\n]}}\n'
    (target / "cases.json").write_text(text, encoding="utf-8")
    if (source / "arrays.npz").exists():
        with np.load(source / "arrays.npz") as archive:
            write_arrays(target / "arrays.npz", dict(archive), dropped)


def write_arrays(path: Path, arrays: dict[str, np.ndarray], dropped: set[str]) -> None:
    """An .npz whose bytes depend on its content only."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(set(arrays) - dropped):
            buffer = io.BytesIO()
            np.save(buffer, arrays[name])
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), 8, 9)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.refresh")
    parser.add_argument("conformance", type=Path)
    parser.add_argument("--set", default="open")
    args = parser.parse_args(arguments)
    root: Path = args.conformance
    for name in ("cases", "assets", "images"):
        (HERE / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / "make_checkpoint.py", HERE / "make_checkpoint.py")
    shutil.copyfile(root / "cases/projection.npy", HERE / "cases/projection.npy")
    for variant in sorted((root / "cases" / args.set).iterdir()):
        copy_variant(variant, HERE / "cases" / args.set / variant.name)
    for kind, pattern in (("assets", "*"), ("images", "*.png")):
        folder = HERE / kind / args.set
        folder.mkdir(exist_ok=True)
        for path in sorted((root / kind / args.set).glob(pattern)):
            if not path.name.startswith(PHOTOGRAPH):
                shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
