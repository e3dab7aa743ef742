"""`lapilli inspect`: what a checkpoint is, without reading its weights."""

import json
from typing import Annotated

import typer

from lapilli.cli import options
from lapilli.cli.terminal import plain_errors

Source = Annotated[str, typer.Argument(help="A directory, a hub id, or pebble.")]


def inspect(
    source: Source = "pebble",
    base: options.Base = None,
    adapter: options.Adapter = None,
    template: options.Template = None,
    as_json: options.Json = False,
) -> None:
    """Print what a checkpoint is: format, architecture, template, tower, tokens, keys."""
    with plain_errors():
        from lapilli.checkpoint.inspect import inspect_checkpoint

        found = inspect_checkpoint(source, base=base, adapter=adapter, template=template)
        typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
