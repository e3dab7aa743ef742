"""The `lapilli` program: a table of commands. `lapilli --help` must not import torch."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, TextIO

try:
    import typer

    from lapilli import __version__
    from lapilli.cli import (
        ask,
        batch,
        build,
        chat,
        data,
        decide,
        export,
        inspect,
        quantize,
        rank,
        serve,
        store,
        train,
    )
    from lapilli.cli.terminal import EXIT_BAD_INPUT, add_command, in_one_line, note, plain_errors
except KeyboardInterrupt:  # the program is still starting
    raise SystemExit(130) from None

COMMANDS: Mapping[str, Callable[..., None] | typer.Typer] = {
    "ask": ask.ask,
    "batch": batch.batch,
    "build": build.build,
    "chat": chat.chat,
    "decide": decide.decide,
    "export": export.export,
    "inspect": inspect.inspect,
    "quantize": quantize.quantize,
    "rank": rank.rank,
    "serve": serve.serve,
    "train": train.train,
    "data": data.app,
    "store": store.app,
}
"""Every command, or group of commands, by its name."""


def build_program(commands: Mapping[str, Callable[..., None] | typer.Typer]) -> typer.Typer:
    """Return the program with these commands."""
    program = typer.Typer(
        name="lapilli",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: rich would cost a third of the time --help may take
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            program.add_typer(command, name=name)
        else:
            add_command(program, name, command)
    program.callback()(_program)
    return program


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"lapilli {__version__}")
        raise typer.Exit
    return wanted


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """LLaVA, finished: ask questions about pictures with any LLaVA checkpoint."""


app = build_program(COMMANDS)


def main() -> None:
    """Run the installed `lapilli` script: no traceback, whatever the streams are."""
    code = 0
    try:
        with plain_errors():
            prepare_streams()
            end_in_order()
            app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    raise SystemExit(close_streams(code))


def end_in_order() -> None:
    """Let a signal that asks to end pass through what cleans up, as Ctrl-C does.

    A folder that is half written is gigabytes that nobody would find.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


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
    """Return the exit code of the program, after what is still to be written was written.

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
    """Write what waits; return the error where that fails, and let the rest go to the null device.

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
