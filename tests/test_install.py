"""What somebody meets before the first answer: the README's beginning, make demo, the sdist."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def test_the_readme_names_the_small_torch_before_anything_else() -> None:
    beginning = (REPOSITORY / "README.md").read_text("utf-8").partition("\n## ")[0]
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in beginning


def test_make_demo_says_what_it_does(tmp_path: Path) -> None:
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    slow = [n for n, line in enumerate(lines) if re.search(r" -m (venv|pip) ", line)]
    assert slow  # a virtual environment, then packages
    for number in slow:
        assert number
        assert lines[number - 1].startswith("echo "), lines[number]


@pytest.mark.slow
def test_the_sdist_has_what_is_needed_to_build_and_no_more(tmp_path: Path) -> None:
    here = tmp_path / "lapilli"  # without the environments beside, which take long to look through
    others = shutil.ignore_patterns(".git", ".venv*", "build", "*cache*", "*.so")
    shutil.copytree(REPOSITORY, here, ignore=others)
    code = f"import scikit_build_core.build as b; print(b.build_sdist({str(tmp_path)!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        paths = [Path(name).parts for name in archive.getnames()]
    names = {parts[1] for parts in paths if len(parts) > 1}
    assert {"pyproject.toml", "README.md", "LICENSE", "src"} <= names
    assert not names & {".ci", ".pre-commit-config.yaml", "locks", "tests", "benchmarks", "recipes"}
