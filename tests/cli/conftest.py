"""A tiny random checkpoint in the original layout, and the program as a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.warm import start_warm

PROGRAM = Path(sys.executable).parent / "lapilli"


@pytest.fixture(scope="session")
def checkpoint(
    conformance: Path, maker: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> str:
    wanted = conformance / "cases" / "open" / "llava-v1.5-tiny-pad" / "spec.json"
    made = maker.build(json.loads(wanted.read_text("utf-8")), str(tmp_path_factory.mktemp("cli")))
    return str(made["model_path"])


@pytest.fixture(scope="session")
def picture(conformance: Path) -> str:
    return str(conformance / "images" / "open" / "rgb_plain_200x120.png")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the script `lapilli` that need not import torch."""
    with start_warm(tmp_path_factory.mktemp("warm")) as scripts:
        yield scripts


@pytest.fixture
def lapilli(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs the program; keyword `input` is its standard input.

    The installed script itself with `warm=False`, or where `preexec_fn` changes the process.
    """

    def run(
        *arguments: str, warm: bool | None = None, **options: object
    ) -> subprocess.CompletedProcess[str]:
        if warm is None:
            warm = "preexec_fn" not in options
        program = request.getfixturevalue("warm") / "lapilli" if warm else PROGRAM
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(tmp_path)}
        settings = {"capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run([str(program), *arguments], env=environment, check=False, **settings)

    return run
