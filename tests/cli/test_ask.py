"""`lapilli ask` as a process: what goes to standard output, what to standard error, exit codes."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run

pytestmark = pytest.mark.slow

SHORT = ("--max-new-tokens", "6", "--device", "cpu")


def test_answer_goes_to_standard_output_alone(lapilli: Run, checkpoint: str, picture: str) -> None:
    done = lapilli("ask", "What is this?", picture, "--model", checkpoint, *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()
    assert done.stderr == ""


def test_json_holds_the_same_answer(lapilli: Run, checkpoint: str, picture: str) -> None:
    plain = lapilli("ask", "What is this?", picture, "--model", checkpoint, *SHORT)
    done = lapilli("ask", "What is this?", picture, "--model", checkpoint, "--json", *SHORT)
    said = json.loads(done.stdout)
    assert said["answer"] == plain.stdout.removesuffix("\n")
    assert said["finish_reason"] == "length"
    assert said["new_tokens"] == 6
    assert said["prompt_tokens"] > 4  # the picture's positions are counted


def test_picture_from_standard_input(lapilli: Run, checkpoint: str, picture: str) -> None:
    named = lapilli("ask", "What is this?", picture, "--model", checkpoint, *SHORT)
    piped = lapilli(
        "ask", "What is this?", "-", "--model", checkpoint, *SHORT,
        text=False, input=Path(picture).read_bytes(),
    )  # fmt: skip
    assert piped.stdout.decode() == named.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is left in a pseudo-terminal")
@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_how_far_loading_is(lapilli: Run, checkpoint: str, quiet: bool) -> None:
    reader, terminal = os.openpty()
    arguments = ("ask", "Hello?", "--model", checkpoint, *SHORT, *(("--quiet",) if quiet else ()))
    done = lapilli(*arguments, capture_output=False, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    seen = b""
    with suppress(OSError):  # raised at the end of what was written
        while True:
            seen += os.read(reader, 1 << 16)
    os.close(reader)
    assert done.returncode == 0, seen
    assert "loading" not in done.stdout
    shown = re.search(rb"loading llava-v1.5-tiny-pad .*[kM]B", seen)
    assert (shown is None) is quiet, seen


def test_question_without_picture(lapilli: Run, checkpoint: str) -> None:
    done = lapilli("ask", "Hello?", "--model", checkpoint, *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_same_seed_same_sample(lapilli: Run, checkpoint: str, picture: str) -> None:
    options = ("--temperature", "1.5", "--model", checkpoint, *SHORT)
    first, second, other = (
        lapilli("ask", "What?", picture, *options, "--seed", seed).stdout
        for seed in ("1", "1", "2")
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("What?", "nowhere.png"), "nowhere.png"),
        (("  ", ), "empty"),
        (("What?", "--model", "no/such/folder/here"), "no/such/folder/here"),
        (("What?", "--template", "vicuna_v9"), "vicuna_v9"),
        (("What?", "-", "-"), "given twice"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    lapilli: Run, checkpoint: str, arguments: tuple[str, ...], message: str
) -> None:
    model = () if "--model" in arguments else ("--model", checkpoint)
    done = lapilli("ask", *arguments, *model, *SHORT, input="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("lapilli: ")
    assert message in done.stderr


def test_file_that_is_no_picture(lapilli: Run, checkpoint: str, tmp_path: Path) -> None:
    wrong = tmp_path / "notes.txt"
    wrong.write_text("not a picture")
    done = lapilli("ask", "What?", str(wrong), "--model", checkpoint, *SHORT)
    assert done.returncode == 2
    assert "notes.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_question_comes_first(lapilli: Run, checkpoint: str, picture: str) -> None:
    options = ("--model", checkpoint, *SHORT)
    done = lapilli("ask", picture, "What is this?", *options)
    assert done.returncode == 2
    assert "What is this? does not exist" in done.stderr
    assert done.stderr.endswith('; the question comes first: lapilli ask "QUESTION" IMAGE\n')
    done = lapilli("ask", picture, *options)
    assert done.returncode == 0
    assert f"{picture} is taken for the question" in done.stderr
    assert lapilli("ask", picture, *options, "--quiet").stderr == ""


def test_a_typed_placeholder_beside_a_picture(lapilli: Run, checkpoint: str, picture: str) -> None:
    options = ("--model", checkpoint, *SHORT)
    done = lapilli("ask", "What <image>?", picture, *options)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("<image> in the question stays text")
    assert lapilli("ask", "What <image>?", *options).stderr == ""


def test_standard_input_has_the_limit_of_other_sources(lapilli: Run, checkpoint: str) -> None:
    with Path("/dev/zero").open("rb") as endless:
        done = lapilli("ask", "What?", "-", "--model", checkpoint, *SHORT, stdin=endless)
    assert done.returncode == 2
    assert "standard input has at least 134217729 bytes, more than the limit" in done.stderr


def test_transparent_pictures(lapilli: Run, checkpoint: str, tmp_path: Path) -> None:
    hidden, white = tmp_path / "hidden.png", tmp_path / "white.png"
    Image.effect_noise((90, 60), 90).convert("RGBA").save(hidden)
    image = Image.open(hidden)
    image.putalpha(0)
    image.save(hidden)
    Image.new("RGB", (90, 60), "white").save(white)
    options = ("--model", checkpoint, *SHORT)
    dropped, composed, expected = (
        lapilli("ask", "What?", str(path), *options, *more).stdout
        for path, more in (
            (hidden, ()),
            (hidden, ("--alpha", "composite")),
            (white, ()),
        )
    )
    assert composed == expected
    assert dropped != expected
    done = lapilli("ask", "What?", str(hidden), *options, "--alpha", "black")
    assert (done.returncode, done.stderr) == (
        2,
        "lapilli: alpha 'black' is unknown: choose from drop, composite\n",
    )


def test_missing_kernels_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LAPILLI_KERNELS", raising=False)
    missing = "lapilli.kernels.library._find = lambda: None;"
    run = "sys.argv[1:] = {arguments}; lapilli.cli.main.main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for arguments, stream in (
        (["ask", "Hi", "--max-new-tokens", "2", "--device", "cpu"], "stderr"),
        (["inspect", "pebble"], "stdout"),
    ):
        code = "import sys, lapilli.cli.main, lapilli.kernels.library;" + missing
        code += run.format(arguments=arguments)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert getattr(done, stream).count("the compiled kernels were not built") == 1
