"""`lapilli chat` as a process, fed through a pipe and through a pseudo-terminal."""

import errno
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import lapilli as package
from lapilli.cli.chat import Conversation, line_editing, unquoted
from lapilli.errors import PromptError
from lapilli.generate.engine import EngineOptions
from lapilli.pipeline.chat import Chat
from tests.cli.conftest import PROGRAM, Run
from tests.generate.engine import test_interrupts

OPTIONS = ("--device", "cpu", "--max-new-tokens", "5")


@pytest.mark.slow
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


@pytest.mark.slow
def test_reset_forgets(lapilli: Run, checkpoint: str, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["Hello?", "/reset", "Who?", f"/save {saved}"]
    lapilli("chat", "--model", checkpoint, *OPTIONS, input="\n".join(lines) + "\n")
    assert json.loads(saved.read_text("utf-8"))[0]["text"] == "Who?"


@pytest.mark.slow
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


@pytest.mark.slow
def test_mistakes_do_not_end_the_conversation(lapilli: Run, checkpoint: str) -> None:
    lines = ["/image nowhere.png", "/dance", "/save nowhere/x.json", "Hello?"]
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input="\n".join(lines) + "\n")
    assert done.returncode == 0
    assert "nowhere.png" in done.stderr
    assert "no command /dance" in done.stderr
    assert f"lapilli: nowhere/x.json: {os.strerror(errno.ENOENT)}" in done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_bytes_that_are_no_text_do_not_end_the_conversation(lapilli: Run, checkpoint: str) -> None:
    lines = b"a \xff\n/image \xfe.png\n/dance \xfd\n/save nowhere/x.json\nHello?\n"
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input=lines, text=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.decode().splitlines()[1:]
    assert "is no character" in said[0]
    assert said[1].endswith(f"does not exist (from {Path.cwd()})")
    assert said[3] == f"lapilli: nowhere/x.json: {os.strerror(errno.ENOENT)}"
    assert done.stdout.strip()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_history_that_cannot_be_kept(lapilli: Run, checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "lapilli").touch()  # a file where the folder should be
    done = lapilli("chat", "--model", checkpoint, *OPTIONS, input="/quit\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("typed", [b"\x04", b"And now?\n\x04"])
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def session() -> Chat:
    return package.load("pebble", device="cpu", engine=EngineOptions(speculate="off"))


@pytest.fixture
def talk(session: Chat) -> Conversation:
    """A conversation that was shown a drawing, and has computed nothing."""
    return begin(session)


def begin(session: Chat) -> Conversation:
    session.reset()
    session.engine.reset_cache()
    talk = Conversation(session, {"max_new_tokens": 40}, quiet=True)
    talk.show(str(DRAWING))
    return talk


DRAWING = Path(__file__).parents[2] / "examples" / "picture.png"
NO_PICTURE = "I need a picture"


def raising(calls: Callable[..., object], *, at: int) -> Callable[..., object]:
    """The same function, but for a KeyboardInterrupt in place of one call."""
    count = 0

    def called(*args: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return calls(*args, **options)

    return called


def check_interrupted(talk: Conversation, shown: str) -> None:
    """Check that what was shown is in the history, and that the picture is not lost."""
    said = shown.removesuffix("\n").strip()
    if said:
        assert talk.session.history
        assert talk.session.history[-1].text.startswith(said)
    assert bool(talk.pictures) is not bool(talk.session.history)
    talk.answer("Describe the picture.")
    assert talk.session.history[0].media
    assert NO_PICTURE not in talk.session.history[-1].text
    assert not talk.pictures


@pytest.mark.parametrize("at", [1, 3, 9])
def test_an_interrupt_inside_a_step(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    layer = talk.session.model.language_model.model.layers[-1]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", raising(layer.forward, at=at))
        talk.answer("Describe the picture.")
    done = capsys.readouterr()
    assert "(stopped)" in done.err
    assert bool(done.out.strip()) is (at > 1)
    check_interrupted(talk, done.out)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupt_while_a_piece_is_written(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "flush", raising(sys.stdout.flush, at=at))
        talk.answer("Describe the picture.")
    done = capsys.readouterr()
    assert "(stopped)" in done.err
    check_interrupted(talk, done.out)


def test_an_interrupt_after_the_last_piece(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Chat, "_remember", raising(Chat._remember, at=1))
        talk.answer("Describe the picture.")
    done = capsys.readouterr()
    assert done.out.strip()
    check_interrupted(talk, done.out)


def test_an_interrupt_while_the_picture_is_read(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Chat, "prepare", raising(Chat.prepare, at=1))
        talk.answer("Describe the picture.")
    assert talk.pictures == [str(DRAWING)]
    check_interrupted(talk, capsys.readouterr().out)


@pytest.mark.slow
def test_an_interrupt_before_many_lines(
    session: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = str(Path(package.__file__).parent)
    monkeypatch.setattr(test_interrupts, "WATCHED", watched)
    begin(session).answer("Describe the picture.")
    at = 1
    while True:
        talk = begin(session)
        capsys.readouterr()
        with test_interrupts.Interrupt(at) as interrupt, suppress(KeyboardInterrupt):  # as `run`
            talk._take("Describe the picture.")
        if interrupt.lines < at:
            break
        try:
            check_interrupted(talk, capsys.readouterr().out)
        except AssertionError as error:
            raise AssertionError(f"interrupted before line {at}") from error
        at += 97 if at < 400 else 8009
    assert at > 2000


def typed(monkeypatch: pytest.MonkeyPatch, talk: Conversation, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    talk.run()


def test_only_regular_files_are_looked_at(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    devices = [name for name in ("/dev/full", "/dev/zero", "/dev/tty") if Path(name).exists()]
    odd = [*devices, str(tmp_path / "pipe"), str(tmp_path)]
    lines = [f"/save {name}" for name in (*odd, tmp_path / "sparse", "a\0b", "~nobody-here/x.json")]
    capsys.readouterr()
    typed(monkeypatch, talk, *lines)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines)
    for name, line in zip(odd, said, strict=False):
        assert line == f"lapilli: {name} is not a regular file: name a file for the conversation"
    assert said[-3] == f"lapilli: {tmp_path / 'sparse'} is no saved conversation: name another file"
    assert "is no path" in said[-2]
    assert said[-1] == f"lapilli: ~nobody-here/x.json: {os.strerror(errno.ENOENT)}"


def test_quotes_around_a_path_and_a_conversation_that_is_replaced(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("a b.png").write_bytes(DRAWING.read_bytes())
    capsys.readouterr()
    typed(monkeypatch, talk, '/image "a b.png"', '/save "a b.json"', "/save 'a b.json'")
    assert capsys.readouterr().err.splitlines() == [
        "a b.png: ask about it",
        "0 turns saved to a b.json",
        "0 turns saved to a b.json, the conversation that was there is replaced",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"a b.png", "a b.json"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'it'\\''s.png'", "it's.png"),
        ("a\\ b.png", "a b.png"),
        ("it's.png", "it's.png"),
        ("'a' 'b'", "'a' 'b'"),
        ("'a", "'a"),
        ("a b.png", "a b.png"),
        ("https://x.org/?a='b'", "https://x.org/?a='b'"),
        ("", ""),
    ],
)
def test_only_quotes_around_the_whole_are_taken_off(typed: str, meant: str) -> None:
    assert unquoted(typed) == meant


def test_a_file_whose_name_has_quotes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path('"x"').touch()
    assert unquoted('"x"') == '"x"'


def test_a_line_without_an_end(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match="a line has 1048576 characters or more"):
        typed(monkeypatch, talk, "x" * (1 << 21))


def test_an_interrupted_command_does_not_end_the_conversation(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(talk, "show", raising(talk.show, at=1))
    typed(monkeypatch, talk, "/image somewhere", "/reset")
    assert capsys.readouterr().err.endswith("\n(stopped)\na new conversation\n")


def test_a_history_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "history")
    with line_editing(tmp_path / "history"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, "/dev/full"])
def test_an_output_that_cannot_be_written_ends_in_one_line(
    lapilli: Run, picture: str, checkpoint: str, target: str | None
) -> None:
    def replace() -> None:
        os.close(1)
        if target is not None:
            os.open(target, os.O_WRONLY)

    done = lapilli(
        "chat", picture, "-q", "--model", checkpoint, *OPTIONS, input="Hello?\nAnd?\n",
        preexec_fn=replace, warm=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("lapilli: ") == 1
    assert len(done.stderr.splitlines()) == 2  # the other is of the picture
