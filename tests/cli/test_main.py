"""The program as a whole: help, version, completion, what it imports."""

import os
import subprocess
import sys

from tests.cli.conftest import PROGRAM, Run

COMMANDS = [
    "ask",
    "batch",
    "bench",
    "build",
    "chat",
    "export",
    "inspect",
    "quantize",
    "train",
    "data",
]


def test_help_names_every_command(lapilli: Run) -> None:
    done = lapilli("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


def test_program_imports_no_torch_before_a_command_runs() -> None:
    heavy = ("torch", "numpy", "PIL")
    code = f"import sys, lapilli.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(lapilli: Run) -> None:
    import lapilli as package

    assert lapilli("--version").stdout.strip() == f"lapilli {package.__version__}"


def test_shell_completion_lists_the_commands() -> None:
    asked = {"_LAPILLI_COMPLETE": "complete_bash", "COMP_WORDS": "lapilli ", "COMP_CWORD": "1"}
    done = subprocess.run(
        [str(PROGRAM)], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    commands = [
        "ask",
        "batch",
        "bench",
        "build",
        "chat",
        "export",
        "inspect",
        "quantize",
        "train",
        "data",
    ]
    assert done.stdout.split() == commands


def test_unknown_option_is_exit_code_2(lapilli: Run) -> None:
    done = lapilli("ask", "Why?", "--colour", "red")
    assert done.returncode == 2
    assert "No such option" in done.stderr
