"""`lapilli build`: the words and exit codes around `build_llava`."""

from pathlib import Path

from tests.cli.conftest import Run


def test_a_llava_is_no_language_model(lapilli: Run, tmp_path: Path) -> None:
    done = lapilli("build", "--language", "pebble", "--vision", "pebble", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "is a LLaVA already: train it as it is" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_parts_are_asked_for(lapilli: Run, tmp_path: Path) -> None:
    done = lapilli("build", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "--language" in done.stderr
