"""How the commands talk to a person: one-line errors, progress on standard error, line editing.

The only room that prints. Nothing here imports torch.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lapilli.checkpoint.source import is_local
from lapilli.errors import LapilliError

if TYPE_CHECKING:
    from lapilli.pipeline import Chat

EXIT_BAD_INPUT = 2


def note(text: str) -> None:
    """One line on standard error, where a pipe does not see it."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def fail(error: BaseException) -> NoReturn:
    """Leave with exit code 2 and one line that names what is wrong."""
    message = " ".join(str(error).split()) or type(error).__name__
    note(f"lapilli: {message}")
    raise SystemExit(EXIT_BAD_INPUT)


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
    with loading(model, quiet=quiet) as progress:
        import lapilli
        from lapilli.generate.engine.options import EngineOptions

        engine = EngineOptions(speculate=speculate)
        if max_rows is not None:
            engine = replace(engine, max_rows=max_rows)
        return lapilli.load(model, progress=progress, engine=engine, **how)


def read_pipe_once(images: list[str]) -> list[str | bytes]:
    """The picture arguments with `-` replaced by what standard input holds."""
    if images.count("-") > 1:
        fail(ValueError("standard input ('-') can be one picture only: it was given twice"))
    return [sys.stdin.buffer.read() if image == "-" else image for image in images]


@contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """Arrow keys and a history that outlives the program, where the platform has readline."""
    try:
        import readline
    except ImportError:  # Windows: input() still works, without history
        yield
        return
    if history.is_file():
        readline.read_history_file(history)
    try:
        yield
    finally:
        history.parent.mkdir(parents=True, exist_ok=True)
        readline.set_history_length(1000)
        readline.write_history_file(history)
