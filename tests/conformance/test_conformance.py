"""The golden cases under pytest, with shapes checked: the first one or few of each op.

`python -m tests.conformance` runs all of them and prints the table; `make test` does both.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.conformance.__main__ import REPOSITORY, find_root, main
from tests.conformance.cases import Case, Variant, find_variants
from tests.conformance.checkpoints import Workshop, load_maker
from tests.conformance.ops import build_registry
from tests.conformance.run import Selection, run_variant

FIRST, WITHOUT_A_MODEL = 1, 4  # cases of each op
COPY = REPOSITORY / "tests/golden/conformance"
VARIANTS = list(find_variants(find_root()))


def first_of_each(cases: list[Case], number: int) -> tuple[str, ...]:
    """The first cases of every op."""
    seen: dict[str, int] = {}
    chosen = []
    for case in cases:
        seen[case.op] = seen.get(case.op, 0) + 1
        if seen[case.op] <= number:
            chosen.append(case.id)
    return tuple(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.set}/{v.name}")
def test_the_numbers_are_those_of_the_original(variant: Variant, tmp_path: Path) -> None:
    workshop = Workshop(variant, load_maker(variant.root), tmp_path)
    number = WITHOUT_A_MODEL if variant.spec is None else FIRST
    ids = first_of_each(variant.cases, number)
    results = list(run_variant(variant, workshop, build_registry(), Selection(ids=ids)))
    failed = [
        f"{r.op} {r.case} ({r.path}): {r.reasons[0]}" for r in results if r.status == "failed"
    ]
    assert not failed
    assert any(r.status == "passed" for r in results)


def copied(name: str, root: Path) -> Path:
    """A conformance directory with one variant of the copy in it."""
    for kind in ("assets", "images"):
        shutil.copytree(COPY / kind, root / kind)
    shutil.copytree(COPY / "cases/open" / name, root / "cases/open" / name)
    shutil.copy(COPY / "make_checkpoint.py", root)
    return root


def test_one_wrong_letter_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("_templates", tmp_path / "golden")
    cases = root / "cases/open/_templates/cases.json"
    text = cases.read_text(encoding="utf-8")
    assert text.count("USER: Count to three. ASSISTANT:") > 1
    cases.write_text(text.replace("USER: Count to three", "USER: count to three", 1), "utf-8")
    report = tmp_path / "report.json"
    assert main(["--root", str(root), "--op", "templates", "--json", str(report)]) == 1
    shown = capsys.readouterr().out
    assert "v1_0 (llava): prompt:" in shown
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    assert {r["case"] for r in results if r["status"] == "failed"} == {"v1_0"}


def test_a_right_run_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("_templates", tmp_path / "golden")
    assert main(["--root", str(root), "--op", "model_name"]) == 0
    assert "2 passed, 0 failed, 0 skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_print_the_table_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied("_templates", tmp_path / "golden")
    shutil.copytree(root / "cases/open/_templates", root / "cases/open/_more")
    tables = []
    for processes in ("1", "2"):
        assert main(["--root", str(root), "--op", "model_name", "--processes", processes]) == 0
        tables.append(capsys.readouterr().out.rpartition(" in ")[0])
    assert tables[0] == tables[1]
    assert "4 passed, 0 failed, 0 skipped" in tables[0]


def test_an_op_without_a_runner_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("_templates", tmp_path / "golden")
    case = {"id": "new", "op": "sing", "input": {}, "expect": {}, "arrays": []}
    (root / "cases/open/_templates/cases.json").write_text(
        json.dumps({"variant": "_templates", "cases": [case]}), encoding="utf-8"
    )
    assert main(["--root", str(root)]) == 1
    assert "no runner for op 'sing'" in capsys.readouterr().out


def test_a_missing_picture_is_a_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied("_images", tmp_path / "golden")
    (root / "images/open/rgb_wide_2000x20.png").unlink()
    arguments = ["--root", str(root), "--case", "conv_image_Pad_wide"]
    assert main(arguments) == 0
    assert "0 passed, 0 failed, 1 skipped" in capsys.readouterr().out


def test_other_hashes_stop_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied("llava-tiny-identity", tmp_path / "golden")
    spec = root / "cases/open/llava-tiny-identity/spec.json"
    changed = json.loads(spec.read_text(encoding="utf-8")) | {"seed": 1}
    spec.write_text(json.dumps(changed), encoding="utf-8")
    assert main(["--root", str(root), "--op", "load"]) == 1
    assert "hashes of the checkpoint" in capsys.readouterr().out


def test_nothing_chosen_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(COPY), "--variant", "nobody"]) == 1
    assert capsys.readouterr().out == "no case was chosen\n"
