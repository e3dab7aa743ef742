"""`lapilli quantize SRC DST`, then the result is used like any checkpoint."""

from pathlib import Path

from tests.cli.conftest import Run


def test_a_quantized_checkpoint_answers(lapilli: Run, tmp_path: Path, picture: str) -> None:
    target = tmp_path / "llava-small"
    done = lapilli("quantize", "pebble", str(target), "--bits", "4", "--group-size", "64")
    assert done.returncode == 0, done.stderr
    assert "MB, 4 bits, groups of 64, symmetric, dynamic" in done.stderr
    assert "embeddings are tied" not in done.stderr
    asked = lapilli("ask", "What is in this picture?", picture, "-m", str(target), "-q")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    shown = lapilli("inspect", str(target))
    assert shown.returncode == 0, shown.stderr
    assert "missing" not in shown.stdout


def test_bad_options_are_one_line(lapilli: Run, tmp_path: Path) -> None:
    done = lapilli("quantize", "pebble", str(tmp_path / "x"), "--bits", "3")
    assert done.returncode == 2
    assert done.stderr.strip() == "lapilli: bits must be 4 or 8, found 3"
