"""`lapilli data`: what is in a data set, and what is wrong with it, before a model learns it."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapilli.cli import options
from lapilli.cli.terminal import note, plain_errors

if TYPE_CHECKING:
    from lapilli.prompt.choose import Template
    from lapilli.train.data import Dataset
    from lapilli.train.data.encoder import PlannedEncoder
    from lapilli.train.data.show import TextSpan

app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)

File = Annotated[
    str, typer.Argument(help="JSON, JSONL, CSV, Parquet or tar; several with {000..012} or *.")
]
Images = Annotated[
    Path | None, typer.Option(help="The folder of the images; without it, the file's own.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Count the tokens of this checkpoint.")
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Longest row; without it, the model's context.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no bar.")]
Number = Annotated[int, typer.Option("-n", min=1, help="How many samples.")]
Start = Annotated[int, typer.Option(min=0, help="Number of the first one, from 0.")]
Placement = Annotated[
    str, typer.Option(help="front: a turn's images stand before its text; written: as written.")
]
ColorMode = Annotated[str, typer.Option(help="auto, always or never.")]


@app.command("check")
def check(
    file: File,
    images: Images = None,
    model: Model = None,
    base: options.Base = None,
    template: options.Template = None,
    max_length: MaxLength = None,
    placement: Placement = "front",
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """Read a data set once and report what is wrong, with line numbers; exit code 1 if anything is.

    Unreadable images, unknown roles, turns out of order, placeholders without images, empty
    answers, duplicates, and with --model samples that are too long, tokens, and how many of them
    are learned.
    """
    wrong = False
    with plain_errors():
        from lapilli.errors import ConfigError
        from lapilli.train.data.check import check as check_data

        dataset = _open(file, images, placement)
        planned, plain = _plan(model, base, template)
        if planned is not None:
            max_length = max_length or planned.context_length
        elif max_length is not None:
            raise ConfigError("--max-length counts the positions of a model: give --model too")
        with _bar(quiet=quiet) as progress:
            report = check_data(
                dataset,
                encoder=None if planned is None else planned.encoder,
                template=plain,
                max_length=max_length,
                progress=progress,
            )
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())
        wrong = bool(report.errors)
    if wrong:
        raise typer.Exit(1)


@app.command("show")
def show(
    file: File,
    number: Number = 5,
    start: Start = 0,
    images: Images = None,
    model: Model = None,
    base: options.Base = None,
    template: options.Template = None,
    placement: Placement = "front",
    color: ColorMode = "auto",
) -> None:
    """Print samples as a model reads them; what is learned is green, or [[in brackets]] in a pipe.

    With --model every token is shown and every image has its number of positions.
    """
    with plain_errors():
        from lapilli.errors import ConfigError, DataError
        from lapilli.train.data.check import ImageChecker
        from lapilli.train.data.show import rendered, tokenized

        colored = _wants_color(color)
        dataset, checker = _open(file, images, placement), ImageChecker()
        planned, plain = _plan(model, base, template)
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


def _open(file: str, images: Path | None, placement: str) -> "Dataset":
    from lapilli.errors import ConfigError
    from lapilli.train.data import open_dataset
    from lapilli.train.recipe import SourceRecipe

    if placement not in ("front", "written"):
        raise ConfigError(f"--placement is {placement!r}: expected front or written")
    source = SourceRecipe(path=file, images=None if images is None else str(images))
    return open_dataset([source], placement="written" if placement == "written" else "front")


def _plan(
    model: str | None, base: str | None, template: str | None
) -> "tuple[PlannedEncoder | None, Template]":
    """What makes rows, where there is a model, and what makes text of turns."""
    from lapilli.prompt.choose import template_by_name
    from lapilli.train.data.encoder import plan_encoder

    if model is None:
        return None, template_by_name(template or "vicuna_v1")
    planned = plan_encoder(model, base=base, template=template)
    return planned, planned.template


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of the samples on standard error; nothing in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _wants_color(color: str) -> bool:
    from lapilli.errors import ConfigError

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
    for stretch in spans:
        style = "green" if stretch.supervised else "magenta" if stretch.is_media else "default"
        shown.append(stretch.text, style=style)
    Console(force_terminal=True, highlight=False, soft_wrap=True).print(shown)
