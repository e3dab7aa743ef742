"""`lapilli inspect`: what a checkpoint is, without reading its weights."""

import json
from typing import Annotated

import typer

from lapilli.cli.terminal import Adapter, Base, Json, Source, Template

Measured = Annotated[
    str | None,
    typer.Option(help="cpu: measure each number format for every layer on this machine."),
]


def inspect(
    source: Source = "pebble",
    base: Base = None,
    adapter: Adapter = None,
    template: Template = None,
    device: Measured = None,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint is: format, architecture, template, tower, tokens, keys."""
    from lapilli.checkpoint.inspect import inspect_checkpoint
    from lapilli.errors import ConfigError
    from lapilli.quant.autotune import Choices, cache_file

    if device not in (None, "cpu"):
        raise ConfigError(f"device {device!r}: only cpu has paths to choose between")
    found = inspect_checkpoint(
        source,
        base=base,
        adapter=adapter,
        template=template,
        choices=None if device is None else Choices(cache_file()),
    )
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_text())
