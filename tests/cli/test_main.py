"""The program as a whole: help, version, completion, what it imports."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lapilli.cli.main import COMMANDS, build_program
from tests.cli.conftest import PROGRAM, Run
from tests.contributing import sample

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_help_names_every_command(lapilli: Run) -> None:
    done = lapilli("--help", warm=False)
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.slow
def test_program_imports_no_torch_before_a_command_runs() -> None:
    heavy = ("torch", "numpy", "PIL")
    code = f"import sys, lapilli.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(lapilli: Run) -> None:
    import lapilli as package

    assert lapilli("--version", warm=False).stdout.strip() == f"lapilli {package.__version__}"


@pytest.mark.slow
def test_shell_completion_lists_the_commands() -> None:
    asked = {"_LAPILLI_COMPLETE": "complete_bash", "COMP_WORDS": "lapilli ", "COMP_CWORD": "1"}
    done = subprocess.run(
        [str(PROGRAM)], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == list(COMMANDS)


@pytest.mark.slow
def test_unknown_option_is_exit_code_2(lapilli: Run) -> None:
    done = lapilli("ask", "Why?", "--colour", "red", warm=False)
    assert done.returncode == 2
    assert "No such option" in done.stderr


ENDS = [*([command, "--help"] for command in COMMANDS), ["--help"], ["--version"], ["inspect"]]
FULL = Path("/dev/full")
SLOW = [pytest.param(command, marks=pytest.mark.slow) for command in ("ask", "chat", "batch")]


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", ENDS, ids=" ".join)
def test_a_full_disk_is_one_line(lapilli: Run, arguments: list[str]) -> None:
    with FULL.open("w") as full:
        done = lapilli(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, f"lapilli: {os.strerror(errno.ENOSPC)}\n")


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
def test_a_full_disk_in_the_middle_of_an_answer(lapilli: Run, checkpoint: str) -> None:
    arguments = ("ask", "Hello?", "--model", checkpoint, "--max-new-tokens", "3", "--device", "cpu")
    with FULL.open("w") as full:
        done = lapilli(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, f"lapilli: {os.strerror(errno.ENOSPC)}\n")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("command", [*SLOW, "--help", "nonsense"])
def test_closed_streams(
    lapilli: Run, checkpoint: str, tmp_path: Path, closed: tuple[int, ...], command: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "a"}\n')
    short = ["--model", checkpoint, "--max-new-tokens", "3", "--device", "cpu", "--quiet"]
    rest = {
        "ask": ["Hello?", *short],
        "chat": short,
        "batch": [str(source), str(tmp_path / "out.jsonl"), *short],
    }.get(command, [])

    def close() -> None:
        for number in closed:
            os.close(number)

    # The installed script as well, where it need not import torch.
    given = None if 0 in closed else ""
    done = lapilli(command, *rest, preexec_fn=close, input=given, warm=bool(rest))
    # Answers and help go to standard output; batch writes a file, and chat was asked nothing.
    is_lost = 1 in closed and command not in ("batch", "chat")
    assert done.returncode == (2 if command == "nonsense" or is_lost else 0), done.stderr
    if is_lost and 2 not in closed and command != "nonsense":
        assert done.stderr.endswith("standard output is closed, so nothing can be written to it\n")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if command == "batch":  # nothing else was written into a file that got a free number
        assert len(json.loads((tmp_path / "out.jsonl").read_text())) == 6


@pytest.mark.slow
@pytest.mark.parametrize("module", ["typer", "typer.main", "lapilli.cli.batch", "lapilli.pipeline"])
def test_an_interrupt_during_an_import(module: str) -> None:
    """The signal comes when Python looks for the module."""
    code = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv[1:] = ['ask', 'Hello?']\n"
        "from lapilli.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(lapilli: Run) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = lapilli("--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.slow
def test_an_encoding_without_the_letters_of_the_answer(lapilli: Run) -> None:
    code = (
        "import sys, typer; from lapilli.cli import main;"
        "main.app = lambda: (sys.stdout.write('a \\u2713'), sys.stderr.write('\\u2713'));"
        "main.main()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a \\u2713", "\\u2713")


@pytest.mark.slow
def test_libraries_that_warn_are_not_heard(lapilli: Run, checkpoint: str, tmp_path: Path) -> None:
    damaged = tmp_path / "exif.jpg"
    Image.new("RGB", (9, 9)).save(damaged, exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    palette = tmp_path / "palette.png"
    Image.new("P", (9, 9)).save(palette, transparency=bytes([0, 128]))
    short = ("--model", checkpoint, "--max-new-tokens", "3", "--device", "cpu")
    done = lapilli("ask", "What?", str(damaged), str(palette), *short)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_the_command_of_contributing(tmp_path: Path) -> None:
    """One file and one row are all that it takes: options, help, errors in one line."""
    caption = sample("Add a command", tmp_path)
    program = build_program({**COMMANDS, "caption": caption.caption})
    run = CliRunner().invoke
    assert "\n  caption   Say in a line each" in run(program, ["--help"]).stdout
    assert "--temperature" in run(program, ["caption", "--help"]).stdout
    picture = str(ROOT / "examples" / "picture.png")
    options = ["--max-new-tokens", "4", "--device", "cpu"]
    done = run(program, ["caption", picture, picture, *options])
    assert (done.exit_code, done.stderr) == (0, "")
    one, two = done.stdout.splitlines()
    assert one == two
    assert one.startswith(f"{picture}: ")
    assert len(one) > len(f"{picture}: ")
    done = run(program, ["caption", "missing.png", *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("lapilli: missing.png")
    assert len(done.stderr.splitlines()) == 1
    done = run(program, ["caption", picture, "--top-p", "0"])
    assert (done.exit_code, done.stderr) == (2, "lapilli: top_p must be in (0, 1], got 0.0\n")
