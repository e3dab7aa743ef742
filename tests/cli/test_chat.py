"""`lapilli chat` as a process, fed through a pipe and through a pseudo-terminal."""

import errno
import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cli.conftest import PROGRAM, Run

pytestmark = pytest.mark.slow

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


def test_saving_replaces_conversations_and_nothing_else(
    lapilli: Run, checkpoint: str, tmp_path: Path
) -> None:
    saved, other = tmp_path / "talk.json", tmp_path / "other.json"
    other.write_text('[{"role": "user", "text": "mine", "more": 1}]')
    lines = ["Hello?", f"/save {saved}", "Who?", f"/save {saved}", f"/save {other}"]
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input="\n".join(lines) + "\n")
    assert len(json.loads(saved.read_text("utf-8"))) == 4
    assert f"{other} is no saved conversation: name another file" in done.stderr
    assert json.loads(other.read_text("utf-8"))[0]["text"] == "mine"


def test_mistakes_do_not_end_the_conversation(lapilli: Run, checkpoint: str) -> None:
    lines = ["/image nowhere.png", "/dance", "Hello?"]
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input="\n".join(lines) + "\n")
    assert done.returncode == 0
    assert "nowhere.png" in done.stderr
    assert "no command /dance" in done.stderr
    assert done.stdout.strip()


def test_bytes_that_are_no_text_do_not_end_the_conversation(lapilli: Run, checkpoint: str) -> None:
    lines = b"a \xff\n/image \xfe.png\n/dance \xfd\n/save nowhere/x.json\nHello?\n"
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input=lines, text=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode().splitlines()[1:]
    assert "is no character" in said[0]
    assert said[1].endswith(f"does not exist (from {Path.cwd()})")
    assert said[3] == f"lapilli: nowhere/x.json: {os.strerror(errno.ENOENT)}"
    assert done.stdout.strip()


def test_a_picture_whose_name_is_no_text(
    lapilli: Run, checkpoint: str, picture: str, tmp_path: Path
) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xfe.png")  # noqa: PTH118 - bytes
    Path(os.fsdecode(path)).write_bytes(Path(picture).read_bytes())
    lines = b"/image " + path + b"\nWhat <image>?\n"
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input=lines, text=False)
    assert done.returncode == 0
    said = done.stderr.decode().splitlines()
    assert said[1].endswith("ask about it")
    assert said[2].startswith("<image> in the question stays text")


def test_a_history_that_cannot_be_kept(lapilli: Run, checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "lapilli").touch()  # a file where the folder should be
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input="/quit\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("typed", [b"\x04", b"And now?\n\x04"])
def test_what_is_typed_during_an_answer_counts(
    checkpoint: str, tmp_path: Path, typed: bytes
) -> None:
    with in_a_terminal(checkpoint, tmp_path, "--max-new-tokens", "300") as (process, main):
        seen = _read_until(main, "> ")
        os.write(main, b"Tell me everything\n")
        seen += _read_some(main, len("Tell me everything") + 10)
        os.write(main, typed)
        seen += _read_to_end(main)
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in seen


def test_interrupt_stops_the_answer_and_not_the_program(checkpoint: str, tmp_path: Path) -> None:
    options = ("--max-new-tokens", "1500", "--speculate", "off")  # an answer that takes its time
    with in_a_terminal(checkpoint, tmp_path, *options) as (process, main):
        seen = _read_until(main, "> ")
        os.write(main, b"Tell me everything\n")
        seen += _read_some(main, len("Tell me everything") + 40)
        os.write(main, b"\x03")
        seen += _read_until(main, "(stopped)")
        os.write(main, b"/quit\n")
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in seen


@contextmanager
def in_a_terminal(
    checkpoint: str, state: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`lapilli chat` in a pseudo-terminal, and the side of it that a person sits at."""
    main, side = pty.openpty()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(state),
        "TERM": "dumb",
    }
    command = [str(PROGRAM), "chat", "--model", checkpoint, "--device", "cpu", "--quiet", *options]
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
        preexec_fn=lambda: _take_terminal(side),
    )  # fmt: skip
    os.close(side)
    try:
        yield process, main
    finally:
        process.kill()
        process.wait()
        os.close(main)


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


def _read_to_end(main: int) -> str:
    text = ""
    with suppress(OSError):  # raised when the program has gone
        while True:
            text += _read(main, bool)
    return text


def _read(main: int, enough: Callable[[str], bool]) -> str:
    text = ""
    deadline = time.monotonic() + 60
    while not enough(text):
        ready, _, _ = select.select([main], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more came after {text!r}"
        text += os.read(main, 1024).decode("utf-8", "replace")
    return text
