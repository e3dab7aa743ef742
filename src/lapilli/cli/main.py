"""The `lapilli` program: a table of commands. `lapilli --help` must not import torch."""

from typing import Annotated

import typer

from lapilli import __version__
from lapilli.cli import ask, batch, build, chat, data, export, inspect, quantize, train
from lapilli.cli.terminal import close_streams, plain_errors, prepare_streams

app = typer.Typer(
    name="lapilli",
    help="LLaVA, finished: ask questions about pictures with any LLaVA checkpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would cost a third of the time --help may take
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("ask")(ask.ask)
app.command("batch")(batch.batch)
app.command("build")(build.build)
app.command("chat")(chat.chat)
app.add_typer(data.app, name="data")
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("quantize")(quantize.quantize)
app.command("train", context_settings=train.SETTINGS)(train.train)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lapilli {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """LLaVA, finished: ask questions about pictures with any LLaVA checkpoint."""


def main() -> None:
    """Entry point of the installed `lapilli` script: no traceback, whatever the streams are."""
    prepare_streams()
    code = 0
    try:
        with plain_errors():
            app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    raise SystemExit(close_streams(code))
