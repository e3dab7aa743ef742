"""The usage example that lapilli was asked for runs as it is printed, word for word."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.compat.conftest import MakeCheckpoint

EXAMPLE = Path(__file__).parent / "seed_example.txt"
PUBLISHED = '"liuhaotian/llava-v1.5-13b"'


def code_block() -> str:
    """The program of the seed: from its first import to the print."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("from llava"))
    last = max(i for i, line in enumerate(lines) if line.startswith("print("))
    return "\n".join(lines[first : last + 1]) + "\n"


@pytest.mark.slow
def test_the_printed_example_answers(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    block = code_block()
    assert block.count(PUBLISHED) == 1
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    script = tmp_path / "example.py"
    script.write_text(block.replace(PUBLISHED, repr(path)), encoding="utf-8")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.jpg")
    run = subprocess.run(
        [sys.executable, "-m", "lapilli.compat", script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    if torch.cuda.is_available():
        assert not run.stderr
    else:
        assert run.stderr == 'lapilli.compat: there is no GPU here: "cuda" means the CPU\n'


def test_the_example_uses_what_the_original_had() -> None:
    block = code_block()
    for part in (".unsqueeze(0).cuda()", "dtype=torch.float16", "skip_special_tokens=True"):
        assert part in block
