"""`lapilli chat`: a conversation in the terminal. Ctrl-C stops an answer, not the program."""

import json
import os
import select
import shlex
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.ask import warn_of_answer, write_answer
from lapilli.cli.terminal import PLACEHOLDER, STAYED_TEXT, ChatOptions, in_one_line, note
from lapilli.config.reader import given_path
from lapilli.errors import LapilliError, PromptError

if TYPE_CHECKING:
    from lapilli.pipeline import Chat

HELP = (
    "/image PATH shows a picture, /reset begins anew, /save FILE keeps the conversation, /quit ends"
)
Image = Annotated[str | None, typer.Argument(help="A picture to begin with.")]

LONGEST_LINE = 1 << 20
"""Most characters of a line that is not typed: more than any context holds."""

LARGEST_SAVED = 1 << 26
"""Most bytes of an earlier conversation that `/save` replaces."""


def chat(image: Image = None, *, how: ChatOptions) -> None:
    """Talk about pictures. /image PATH, /reset, /save FILE, /quit; Ctrl-C stops an answer."""
    conversation = Conversation(how.load(), how.sampling, quiet=how.quiet)
    if image is not None:
        conversation.show(image)
    if not how.quiet:
        note(HELP)
    with line_editing(_history_file()):
        conversation.run()


class Conversation:
    """A conversation in the terminal: lines in, answers out, until the input ends."""

    def __init__(self, session: "Chat", sampling: dict[str, Any], *, quiet: bool) -> None:
        self.session = session
        self.sampling = sampling
        self.quiet = quiet
        self.pictures: list[str] = []  # shown, and not yet part of a question

    def run(self) -> None:
        """Read and answer until /quit or the end of the input."""
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                note("\n(nothing to stop; /quit or Ctrl-D ends)")
                continue
            if line in ("/quit", "/exit"):
                return
            if line:
                try:
                    self._take(line)
                except KeyboardInterrupt:  # of a command, or a second one
                    note("\n(stopped)")

    @staticmethod
    def _read() -> str:
        """Return the next line.

        Raises:
            EOFError: there is none.
            PromptError: it is longer than `LONGEST_LINE`; standard input may be anything.
        """
        if not sys.stdin.isatty():
            line = sys.stdin.readline(LONGEST_LINE)
            if not line:
                raise EOFError
            if len(line) == LONGEST_LINE:
                raise PromptError(
                    f"standard input: a line has {LONGEST_LINE} characters or more, which no "
                    "context holds: expected a question in each line"
                )
            return line
        ahead = typed_ahead()
        if ahead == "":
            raise EOFError
        return input("> ") if ahead is None else ahead

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self.show,
            "/save": self.save,
            "/reset": self.reset,
            "/help": self.help,
        }
        try:
            if command in commands:
                try:
                    commands[command](unquoted(argument.strip()))
                except OSError as error:  # a mistyped path must not end the conversation
                    note(f"lapilli: {in_one_line(error)}")
            elif command.startswith("/"):
                note(f"no command {command}: {HELP}")
            else:
                self.answer(line)  # an OSError of it ends: answers can be written no more
        except LapilliError as error:
            note(f"lapilli: {in_one_line(error)}")

    def show(self, path: str) -> None:
        """Keep a picture for the next question."""
        self.session.check_image(path)
        self.pictures.append(path)
        note(f"{path}: ask about it")

    def reset(self, _: str = "") -> None:
        """Forget what was said and shown."""
        self.session.reset()
        self.pictures.clear()
        note("a new conversation")

    def help(self, _: str = "") -> None:
        """List the commands."""
        note(HELP)

    def save(self, path: str) -> None:
        """Write the conversation as JSON, roles and texts in order.

        Raises:
            PromptError: the file holds something else than a saved conversation, or is no regular
                file.
            OSError: it cannot be written.
        """
        target = given_path(path or "conversation.json")
        content = earlier_content(target)
        if not is_conversation(content):
            raise PromptError(f"{target} is no saved conversation: name another file")
        turns = [{"role": turn.role, "text": turn.text} for turn in self.session.history]
        target.write_text(json.dumps(turns, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        replaced = ", the conversation that was there is replaced" if content else ""
        note(f"{len(turns)} turns saved to {target}{replaced}")

    def answer(self, question: str) -> None:
        """Answer; Ctrl-C ends the answer and keeps what was said of it.

        Where nothing was said, the pictures wait for the next question.
        """
        before = self.session.history
        if self.pictures and PLACEHOLDER in question and not self.quiet:
            note(STAYED_TEXT)
        try:
            write_answer(self.session, question, self.pictures, self.sampling)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            note("(stopped)")
        finally:
            if self.session.history is not before:
                self.pictures.clear()
        if not self.quiet:
            warn_of_answer(self.session)


def unquoted(path: str) -> str:
    """Return a path without the quotes or backslashes that a terminal gives a dropped file."""
    is_quoted = path.startswith(("'", '"')) or (os.sep == "/" and "\\" in path)
    if is_quoted and not os.path.lexists(path):
        with suppress(ValueError):  # a quote that does not end
            words = shlex.split(path)
            if len(words) == 1:
                return words[0]
    return path


def earlier_content(target: Path) -> bytes:
    """Return what a file holds that is going to be written, b"" where there is none.

    Of a file that is larger than a conversation, only the beginning.

    Raises:
        PromptError: it is no regular file: a device may have no end, and a pipe no reader.
        OSError: it cannot be read.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return b""
    except ValueError as error:  # a NUL in the name
        raise PromptError(f"{str(target)!r} is no path: {error}") from error
    if not stat.S_ISREG(mode):
        raise PromptError(f"{target} is not a regular file: name a file for the conversation")
    with target.open("rb") as file:
        return file.read(LARGEST_SAVED + 1)


def is_conversation(content: bytes) -> bool:
    """Return whether this is nothing, or a conversation that `/save` wrote."""
    if len(content) > LARGEST_SAVED:
        return False
    try:
        turns = json.loads(content or b"[]")
    except (ValueError, RecursionError):
        return False
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and set(turn) == {"role", "text"} for turn in turns
    )


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() fails for a user without one
    return (Path(state) if state else Path(home, ".local", "state")) / "lapilli" / "history"


@contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """Edit lines with arrow keys and a lasting history, where the platform has readline."""
    try:
        import readline
    except ImportError:  # Windows: input() still works, without history
        yield
        return
    if os.path.lexists(history) and not os.path.isfile(history):  # noqa: PTH113 - raises nothing
        yield  # a pipe or a device, which might have no end
        return
    with suppress(OSError):  # none yet, or one that cannot be read: no reason not to talk
        readline.read_history_file(history)
    try:
        yield
    finally:
        with suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(history)


def typed_ahead() -> str | None:
    """Return a line typed while nobody was reading; "" for Ctrl-D, None where there is none.

    A terminal keeps a Ctrl-D as an end of the input for whoever reads next. Line editing switches
    it to single keys first, and the Ctrl-D is gone: so it is looked for before that.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None  # input() reads lines here, and finds the end by itself
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    if not ready:
        return None
    return os.read(sys.stdin.fileno(), 1 << 16).decode(sys.stdin.encoding, "surrogateescape")
