"""Options that several commands share, each written once; imports no torch.

Sampling options are not written at all: they are made from the fields of SamplingParams.
"""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lapilli.cli.terminal import plain_errors
from lapilli.config.generation import SamplingParams, value_type

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A directory, a hub id, or pebble."),
]
Base = Annotated[
    str | None,
    typer.Option(help="The language model under a LoRA or a projector-only checkpoint."),
]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter for the model.")]
Template = Annotated[
    str | None,
    typer.Option(help="Conversation template by name, such as vicuna_v1."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[str | None, typer.Option(help="int8 or int4: smaller and faster on a CPU.")]
Alpha = Annotated[
    str,
    typer.Option(help="Transparent pictures: drop shows what lies under, composite lays on white."),
]
Speculate = Annotated[
    str, typer.Option(help="Guess tokens ahead and check them: on, off, or auto, while it pays.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the answer.")]
Source = Annotated[str, typer.Argument(help="A directory, a hub id, or pebble.")]
Target = Annotated[Path, typer.Argument(help="The new directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory.")]

Sampling = dict[str, Any]
"""The sampling options of a command: keyword arguments of SamplingParams.from_options."""


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of SamplingParams in place of its `sampling`."""
    before = inspect.signature(command)
    options = [_parameter(one) for one in fields(SamplingParams)]
    known = {option.name: option for option in options if option is not None}

    @wraps(command)
    def with_options(**given: Any) -> None:  # noqa: ANN401  what typer read
        chosen = {name: given.pop(name) for name in known}
        sampling = {name: value for name, value in chosen.items() if value is not None}
        with plain_errors():
            # A wrong value is told before a model is loaded.
            SamplingParams.from_options(**sampling)
        command(**given, sampling=sampling)

    parameters: list[inspect.Parameter] = []
    for parameter in before.parameters.values():
        if parameter.name == "sampling":
            parameters += known.values()
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    with_options.__signature__ = before.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


def _parameter(one: "Field[Any]") -> inspect.Parameter | None:
    """Return the command's parameter for a sampling option; None: not for the terminal."""
    option, kind, default = one.metadata["option"], value_type(one), one.default
    if not option.in_terminal:
        return None
    bounds = {"min": option.low, "max": option.high}
    if kind not in (int, float):  # several values: the option is repeated
        kind, default = list[int] if kind == tuple[int, ...] else list[str], None
        bounds = bounds if kind == list[int] else {}
    annotation = kind if default is not None else kind | None
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, typer.Option(help=option.help, **bounds)],
    )
