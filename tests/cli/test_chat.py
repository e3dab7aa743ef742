"""`lapilli chat` as a process, fed through a pipe and through a pseudo-terminal."""

import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import PROGRAM, Run

OPTIONS = ("--device", "cpu", "--max-new-tokens", "5")


def test_conversation_through_a_pipe(
    lapilli: Run, checkpoint: str, picture: str, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = ["What is this?", "And now?", f"/save {saved}", "/quit"]
    done = lapilli("chat", picture, "--model", checkpoint, *OPTIONS, input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    turns = json.loads(saved.read_text("utf-8"))
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert turns[2]["text"] == "And now?"
    assert done.stdout.splitlines()[0] == turns[1]["text"]


def test_reset_forgets(lapilli: Run, checkpoint: str, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["Hello?", "/reset", "Who?", f"/save {saved}"]
    lapilli("chat", "--model", checkpoint, *OPTIONS, input="\n".join(lines) + "\n")
    assert json.loads(saved.read_text("utf-8"))[0]["text"] == "Who?"


def test_mistakes_do_not_end_the_conversation(lapilli: Run, checkpoint: str) -> None:
    lines = ["/image nowhere.png", "/dance", "Hello?"]
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input="\n".join(lines) + "\n")
    assert done.returncode == 0
    assert "nowhere.png" in done.stderr
    assert "no command /dance" in done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_interrupt_stops_the_answer_and_not_the_program(checkpoint: str, tmp_path: Path) -> None:
    main, side = pty.openpty()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(tmp_path),
        "TERM": "dumb",
    }
    command = [str(PROGRAM), "chat", "--model", checkpoint, "--device", "cpu", "--quiet"]
    command += ["--max-new-tokens", "1500", "--speculate", "off"]  # an answer that takes its time
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
        preexec_fn=lambda: _take_terminal(side),
    )  # fmt: skip
    seen = ""
    try:
        seen += _read_until(main, "> ")
        os.write(main, b"Tell me everything\n")
        seen += _read_some(main, len("Tell me everything") + 40)
        os.write(main, b"\x03")
        seen += _read_until(main, "(stopped)")
        os.write(main, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
        os.close(side)
    assert "Traceback" not in seen


def _take_terminal(side: int) -> None:
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
    fcntl.ioctl(side, termios.TIOCSCTTY, 0)


def _read_some(main: int, count: int) -> str:
    return _read(main, lambda text: len(text) >= count)


def _read_until(main: int, wanted: str) -> str:
    return _read(main, lambda text: wanted in text)


def _read(main: int, enough: Callable[[str], bool]) -> str:
    text = ""
    deadline = time.monotonic() + 60
    while not enough(text):
        ready, _, _ = select.select([main], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more came after {text!r}"
        text += os.read(main, 1024).decode("utf-8", "replace")
    return text
