"""`lapilli data`: what is in a data set, and what is wrong with it, before a model learns it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapilli.cli.terminal import Base, Json, Template, add_command, counting, note
from lapilli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lapilli.prompt.choose import Template as PromptTemplate
    from lapilli.train.data import Dataset
    from lapilli.train.data.check import TextSpan
    from lapilli.train.data.encoder import PlannedEncoder

File = Annotated[
    str, typer.Argument(help="JSON, JSONL, CSV, Parquet or tar; several with {000..012} or *.")
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Longest row; without it, the model's context.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no bar.")]
Number = Annotated[int, typer.Option("-n", min=1, help="How many samples.")]
Start = Annotated[int, typer.Option(min=0, help="Number of the first one, from 0.")]
ColorMode = Annotated[str, typer.Option(help="auto, always or never.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Options of how a data set is read, and for which model."""

    images: Annotated[
        Path | None, typer.Option(help="The folder of the images; without it, the file's own.")
    ] = None
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Count the tokens of this checkpoint.")
    ] = None
    base: Base = None
    template: Template = None
    placement: Annotated[
        str,
        typer.Option(help="front: a turn's images stand before its text; written: as written."),
    ] = "front"

    def open(self, file: str) -> "Dataset":
        """Return the data set of a file."""
        from lapilli.train.data import open_dataset
        from lapilli.train.recipe import SourceRecipe

        if self.placement not in ("front", "written"):
            raise ConfigError(f"--placement is {self.placement!r}: expected front or written")
        source = SourceRecipe(path=file, images=None if self.images is None else str(self.images))
        return open_dataset(
            [source], placement="written" if self.placement == "written" else "front"
        )

    def plan(self) -> "tuple[PlannedEncoder | None, PromptTemplate]":
        """Return the encoder of rows, where there is a model, and the template of turns."""
        from lapilli.prompt.choose import template_by_name
        from lapilli.train.data.encoder import plan_encoder

        if self.model is None:
            return None, template_by_name(self.template or "vicuna_v1")
        planned = plan_encoder(self.model, base=self.base, template=self.template)
        return planned, planned.template


def check(
    file: File,
    *,
    how: DataOptions,
    max_length: MaxLength = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a data set once and report what is wrong, with line numbers; exit code 1 if anything is.

    Unreadable images, unknown roles, turns out of order, placeholders without images, empty
    answers, duplicates, and with --model samples that are too long, tokens, and how many of them
    are learned.
    """
    from lapilli.train.data.check import check as check_data

    dataset = how.open(file)
    planned, plain = how.plan()
    if planned is not None:
        max_length = max_length or planned.context_length
    elif max_length is not None:
        raise ConfigError("--max-length counts the positions of a model: give --model too")
    with counting(quiet=quiet, transient=True) as progress:
        report = check_data(
            dataset,
            encoder=None if planned is None else planned.encoder,
            template=plain,
            max_length=max_length,
            progress=progress,
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())
    if report.errors:
        raise typer.Exit(1)


def show(
    file: File, number: Number = 5, start: Start = 0, *, how: DataOptions, color: ColorMode = "auto"
) -> None:
    """Print samples as a model reads them; what is learned is green, or [[in brackets]] in a pipe.

    With --model every token is shown and every image has its number of positions.
    """
    from lapilli.train.data.check import ImageChecker, rendered, tokenized

    colored = _wants_color(color)
    dataset, checker = how.open(file), ImageChecker()
    planned, plain = how.plan()
    if planned is not None:
        dataset = dataset.declaring(planned.encoder.modalities)
    if start >= len(dataset):
        raise ConfigError(f"--start is {start}, and {file} has {len(dataset)} samples")
    for index in range(start, min(start + number, len(dataset))):
        try:
            sample = dataset.sample(index)
            spans = (
                rendered(sample, plain)
                if planned is None
                else tokenized(sample, planned.encoder, checker)
            )
        except DataError as error:
            note(f"cannot be learned: {error}")
            continue
        _print(f"--- {sample.label}", spans, colored=colored)


app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)
add_command(app, "check", check)
add_command(app, "show", show)


def _wants_color(color: str) -> bool:
    if color not in ("auto", "always", "never"):
        raise ConfigError(f"--color is {color!r}: expected auto, always or never")
    return color == "always" or (color == "auto" and sys.stdout.isatty())


def _print(title: str, spans: "Sequence[TextSpan]", *, colored: bool) -> None:
    if not colored:
        typer.echo(title)
        typer.echo("".join(f"[[{s.text}]]" if s.supervised else s.text for s in spans))
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text()
    shown.append(f"{title}\n", style="dim")
    for span in spans:
        style = "green" if span.supervised else "magenta" if span.is_media else "default"
        shown.append(span.text, style=style)
    Console(force_terminal=True, highlight=False, soft_wrap=True).print(shown)
