"""A tiny random checkpoint in the original layout, and the program as a process."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "lapilli"


@pytest.fixture(scope="session")
def checkpoint(conformance: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = importlib.util.spec_from_file_location("maker", conformance / "make_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    wanted = conformance / "cases" / "open" / "llava-v1.5-tiny-pad" / "spec.json"
    made = maker.build(json.loads(wanted.read_text("utf-8")), str(tmp_path_factory.mktemp("cli")))
    return str(made["model_path"])


@pytest.fixture(scope="session")
def picture(conformance: Path) -> str:
    return str(conformance / "images" / "open" / "rgb_plain_200x120.png")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lapilli(tmp_path: Path) -> Run:
    """Runs the installed program; keyword `input` is its standard input."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(tmp_path)}
        settings = {"capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run([str(PROGRAM), *arguments], env=environment, check=False, **settings)

    return run
