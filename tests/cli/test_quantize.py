"""`lapilli quantize SRC DST`, then the result is used like any checkpoint."""

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.integration.oracle import make_oracle

pytestmark = pytest.mark.slow


def test_a_quantized_checkpoint_answers(lapilli: Run, tmp_path: Path, picture: str) -> None:
    target = tmp_path / "llava-small"
    done = lapilli("quantize", "pebble", str(target), "--bits", "4", "--group-size", "64")
    assert done.returncode == 0, done.stderr
    assert "4 bits, groups of 64, nonlinear levels, values in 8 bits, dynamic" in done.stderr
    assert "embeddings are tied" not in done.stderr
    asked = lapilli("ask", "What is in this picture?", picture, "-m", str(target), "-q")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    shown = lapilli("inspect", str(target))
    assert shown.returncode == 0, shown.stderr
    assert "missing" not in shown.stdout


def test_a_checkpoint_of_hugging_face_is_quantized_with_its_chat_template(
    lapilli: Run, tmp_path: Path, picture: str
) -> None:
    source = make_oracle(tmp_path / "hf", next_=False, text="llama", tower="clip").path
    done = lapilli("quantize", str(source), str(tmp_path / "small"), "-q")
    assert done.returncode == 0, done.stderr
    options = ("-q", "--max-new-tokens", "6")
    expected = lapilli("ask", "What?", picture, "-m", str(source), "--quantize", "int4", *options)
    asked = lapilli("ask", "What?", picture, "-m", str(tmp_path / "small"), *options)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == expected.stdout
    again = lapilli("quantize", str(tmp_path / "small"), str(tmp_path / "x"), "--bits", "8", "-q")
    assert again.returncode == 2
    assert "is quantized already" in again.stderr


def test_bad_options_are_one_line(lapilli: Run, tmp_path: Path) -> None:
    done = lapilli("quantize", "pebble", str(tmp_path / "x"), "--bits", "5")
    assert done.returncode == 2
    assert done.stderr.strip() == "lapilli: bits must be 3, 4 or 8, found 5"
