"""A demo in the manner of TinyChat's, run as a program: a picture, then turns that are kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.compat.conftest import MakeCheckpoint

DEMO = Path(__file__).with_name("tinychat_demo.txt")
QUESTIONS = ["What is shown?", "Where is it?", "And what is beside it?", "Why?"]


@pytest.mark.slow
def test_turns_that_are_kept_and_turns_that_are_sent_again(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, picture: Image.Image
) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    (tmp_path / "demo.py").write_text(DEMO.read_text(encoding="utf-8"), encoding="utf-8")
    picture.save(tmp_path / "picture.png")

    def run(way: str) -> list[dict[str, Any]]:
        arguments = ["demo.py", path, "picture.png", way, *QUESTIONS]
        done = subprocess.run(
            [sys.executable, "-m", "lapilli.compat", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    kept, whole = run("kept"), run("whole")
    assert len(kept) == len(QUESTIONS)
    for turn, (one, again) in enumerate(zip(kept, whole, strict=True)):
        assert (one["said"], one["end"]) == (again["said"], again["end"])
        # Where the turn before ended, and what is sent and said in this one, is where it ends.
        before = kept[turn - 1]["end"] if turn else 0
        assert one["end"] == before + one["sent"] + len(one["said"])
    assert all(one["sent"] < kept[0]["sent"] / 2 for one in kept[1:])
    assert whole[-1]["sent"] > kept[0]["sent"]
