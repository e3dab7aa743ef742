"""How the commands talk to a person: one-line errors, progress on standard error, line editing.

The only room that prints. Nothing here imports torch.
"""

import errno
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from lapilli.checkpoint.source import is_local
from lapilli.errors import LapilliError

if TYPE_CHECKING:
    from lapilli.pipeline import Chat

EXIT_BAD_INPUT = 2

PLACEHOLDER = "<image>"
STAYED_TEXT = f"{PLACEHOLDER} in the question stays text: the pictures stand before the question"


def note(text: str) -> None:
    """One line on standard error, where a pipe does not see it; lost where that cannot be written.

    What goes wrong has an exit code too, and there is no other place to say it.
    """
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def in_one_line(error: BaseException) -> str:
    """What is wrong, for people: without line ends, and without the number of a system error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, LapilliError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([" -> ".join(names), error.strerror]) if names else error.strerror
        if error.errno == errno.EBADF and not names:  # see prepare_streams
            text = "standard output is closed, so nothing can be written to it"
    return " ".join(text.split()) or type(error).__name__


def fail(error: BaseException) -> NoReturn:
    """Leave with exit code 2 and one line that names what is wrong."""
    note(f"lapilli: {in_one_line(error)}")
    raise SystemExit(EXIT_BAD_INPUT)


def prepare_streams() -> None:
    """Make the three standard streams safe to use, whatever they were started with.

    One that is closed (`>&-`) becomes the null device: otherwise the next file to be opened would
    take its number, and what a library prints would be written into that file. On a closed standard
    output the null device cannot be written, so an answer that is lost is an error and not a
    success (`close_streams`). Text that cannot be written in the terminal's encoding is escaped;
    bytes that are no text are kept as half characters, which open the file that they name and are
    refused in a question. Warnings are for people who write programs: they are shown with
    `python -W`, and not here.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                # It takes the lowest number that is free: this one.
                os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def close_streams(code: int) -> int:
    """The exit code of the program, after what is still to be written was written.

    A reader that has seen enough (head, less) is no fault. A disk that is full is one.
    """
    failed = _flush(sys.stdout)
    if failed is not None and not isinstance(failed, BrokenPipeError):
        if code == 0:
            note(f"lapilli: standard output: {in_one_line(failed)}")
        code = code or EXIT_BAD_INPUT
    _flush(sys.stderr)
    return code


def _flush(stream: TextIO) -> Exception | None:
    """Write what waits; what cannot be written goes to the null device, and the error comes back.

    Python flushes once more when it ends, and prints a traceback if that fails.
    """
    try:
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
        null = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(null, stream.fileno())
        os.close(null)
        return error
    return None


@contextmanager
def plain_errors() -> Iterator[None]:
    """What goes wrong on purpose becomes one line and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (LapilliError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None  # the reader (head, less) has seen enough
        fail(error)
    except KeyboardInterrupt:
        note("")
        raise SystemExit(130) from None


@contextmanager
def loading(model: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """On standard error a spinner, then a bar that `lapilli.load(progress=...)` moves.

    None in a pipe and with --quiet. What comes from the hub shows the hub's own bars first.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    name = Path(model).name if is_local(model) else model
    console = Console(stderr=True)
    spinner = console.status(f"loading {name}")
    text = TextColumn("loading {task.description}", markup=False)
    bar = Progress(text, BarColumn(), DownloadColumn(), console=console, transient=True)
    task = bar.add_task(name)

    def show(done: int, total: int) -> None:
        spinner.stop()
        bar.start()
        bar.update(task, completed=done, total=total)

    if is_local(model):
        spinner.start()
    try:
        yield show
    finally:
        spinner.stop()
        bar.stop()


def open_chat(
    model: str,
    *,
    quiet: bool,
    speculate: str,
    max_rows: int | None = None,
    **how: Any,  # noqa: ANN401 - see lapilli.load
) -> "Chat":
    """`lapilli.load` behind a bar; the imports that take time are behind it too."""
    chat = _load(model, quiet=quiet, speculate=speculate, max_rows=max_rows, **how)
    if not quiet:
        _warn_of_slow_cpu(chat)
        # Settings that other programs follow: with them the answers are others.
        for line in chat.report.notes:
            if line.startswith("generation_config.json"):
                note(line)
    return chat


def _warn_of_slow_cpu(chat: "Chat") -> None:
    """Say in one line that a model on a CPU runs without the compiled kernels."""
    from lapilli.kernels.library import why_not_native

    reason = why_not_native()
    if reason and next(chat.model.parameters()).device.type == "cpu":
        note(reason)


def _load(
    model: str,
    *,
    quiet: bool,
    speculate: str,
    max_rows: int | None,
    **how: Any,  # noqa: ANN401 - see lapilli.load
) -> "Chat":
    with loading(model, quiet=quiet) as progress:
        import lapilli
        from lapilli.config.generation import EngineOptions

        engine = EngineOptions(speculate=speculate)
        if max_rows is not None:
            engine = replace(engine, max_rows=max_rows)
        return lapilli.load(model, progress=progress, engine=engine, **how)


def read_pipe_once(images: list[str]) -> list[str | bytes]:
    """The picture arguments with `-` replaced by what standard input holds."""
    if images.count("-") > 1:
        fail(ValueError("standard input ('-') can be one picture only: it was given twice"))
    if "-" not in images:
        return list(images)
    from lapilli.media.fetch import fetch

    piped = fetch("-", stdin=sys.stdin.buffer).data
    assert isinstance(piped, bytes)  # noqa: S101 - what a stream gives
    return [piped if image == "-" else image for image in images]


@contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """Arrow keys and a history that outlives the program, where the platform has readline."""
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
    """What was typed while nobody was reading: a whole line, "" for Ctrl-D, None for nothing.

    A terminal keeps a Ctrl-D as an end of the input for whoever reads next. Line editing switches
    it to single keys first, and the Ctrl-D is gone: so it is looked for before that.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None  # input() reads lines here, and finds the end by itself
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    if not ready:
        return None
    return os.read(sys.stdin.fileno(), 1 << 16).decode(sys.stdin.encoding, "surrogateescape")
