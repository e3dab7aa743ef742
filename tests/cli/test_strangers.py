"""A folder that cannot be used ends in exit code 2 and one line, whichever file it is."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run

pytestmark = pytest.mark.slow


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def many_layers(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 10**9}))


def gguf(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)


def empty_weights(folder: Path) -> None:
    for file in (*folder.glob("*.bin"), *folder.glob("*.safetensors")):
        file.write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (deep, "config.json is nested more than"),
        (pipe, "config.json is a device or a pipe"),
        (many_layers, "num_hidden_layers must be a number of at most 1000, got 1000000000"),
        (gguf, "model.gguf is GGUF, the format of llama.cpp"),
        (empty_weights, "is truncated or no"),
    ],
)
def test_one_line_and_exit_code_2(
    lapilli: Run, checkpoint: str, tmp_path: Path, damage, says: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    for command in (["inspect", str(folder)], ["ask", "-m", str(folder), "Hello?"]):
        done = lapilli(*command)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("lapilli: ")
        assert done.stderr.count("\n") == 1
        assert says in done.stderr
