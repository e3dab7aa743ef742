"""Every code block of the README and the guide runs and prints what it claims to print.

```python    the blocks of a page run in order in one process, beside the example pictures
```console   lines after `$ ` run in a shell; the lines below are the output, `...` is anything
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warm import start_warm

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs" / "guide").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KNOWN = {"python", "console", "text", "json", "toml"}


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(page.read_text("utf-8")) if name == language]


def environment(programs: Path) -> dict[str, str]:
    """Return the environment of a reader who stands in a checkout of the repository.

    `programs` holds the installed `lapilli`, or one that need not import torch.
    """
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), scripts, os.environ["PATH"]]),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in (REPOSITORY / "examples").iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with start_warm(tmp_path_factory.mktemp("warm")) as scripts:
        yield scripts


def run(
    command: list[str],
    folder: Path,
    programs: Path = Path(sys.executable).parent,
    *,
    shell_line: str | None = None,
) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(programs),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{shell_line or command}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fenced_blocks_name_a_language_that_is_tested(page: Path) -> None:
    assert {name for name, _ in BLOCK.findall(page.read_text("utf-8"))} <= KNOWN


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(page: Path, folder: Path) -> None:
    program = folder / "page.py"
    program.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    run([sys.executable, "-W", "error", str(program)], folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=lambda p: p.stem)
def test_console_blocks_print_what_they_show(page: Path, folder: Path, programs: Path) -> None:
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, expected = part.partition("\n")
            if line.startswith("make "):
                target = line.split()[1]
                assert re.search(
                    rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE
                )
                continue
            printed = run(["bash", "-c", line], folder, programs, shell_line=line)
            if expected.strip():
                pattern = expected.strip().replace("[", "[[]").replace("...", "*")
                assert fnmatch.fnmatchcase(printed.strip(), pattern), printed
