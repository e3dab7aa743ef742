"""`lapilli chat`: a conversation in the terminal. Ctrl-C stops an answer, not the program."""

import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.ask import warn_of_answer, write_answer
from lapilli.cli.terminal import PLACEHOLDER, STAYED_TEXT, ChatOptions, in_one_line, note
from lapilli.errors import LapilliError, PromptError

if TYPE_CHECKING:
    from lapilli.pipeline import Chat

HELP = (
    "/image PATH shows a picture, /reset begins anew, /save FILE keeps the conversation, /quit ends"
)
Image = Annotated[str | None, typer.Argument(help="A picture to begin with.")]


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
                self._take(line)

    @staticmethod
    def _read() -> str:
        """Return the next line.

        Raises:
            EOFError: there is none.
        """
        ahead = typed_ahead()
        if ahead == "":
            raise EOFError
        return input("> " if sys.stdin.isatty() else "") if ahead is None else ahead

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
                commands[command](argument.strip())
            elif command.startswith("/"):
                note(f"no command {command}: {HELP}")
            else:
                self.answer(line)
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except (LapilliError, OSError) as error:
            # A mistyped path must not end the conversation.
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
            PromptError: the file holds something else than a saved conversation.
        """
        target = Path(path or "conversation.json").expanduser()
        if target.exists() and not is_conversation(target):
            raise PromptError(f"{target} is no saved conversation: name another file")
        turns = [{"role": turn.role, "text": turn.text} for turn in self.session.history]
        target.write_text(json.dumps(turns, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        note(f"{len(turns)} turns saved to {target}")

    def answer(self, question: str) -> None:
        """Answer; Ctrl-C ends the answer and keeps what was said of it."""
        if self.pictures and PLACEHOLDER in question and not self.quiet:
            note(STAYED_TEXT)
        try:
            write_answer(self.session, question, self.pictures, self.sampling)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            note("(stopped)")
        self.pictures.clear()
        if not self.quiet:
            warn_of_answer(self.session)


def is_conversation(path: Path) -> bool:
    """Return whether a file is empty or holds a conversation that `/save` wrote."""
    try:
        turns = json.loads(path.read_bytes() or b"[]")
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
