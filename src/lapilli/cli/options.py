"""The options that several commands share, each written once. Imports typer and nothing else."""

from typing import Annotated

import typer

_MODEL = "Model"
_ANSWER = "Answer"

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A directory, a hub id, or pebble.", rich_help_panel=_MODEL),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The language model under a LoRA or a projector-only checkpoint.",
        rich_help_panel=_MODEL,
    ),
]
Adapter = Annotated[
    str | None, typer.Option(help="A PEFT adapter for the model.", rich_help_panel=_MODEL)
]
Template = Annotated[
    str | None,
    typer.Option(help="Conversation template by name, such as vicuna_v1.", rich_help_panel=_MODEL),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...", rich_help_panel=_MODEL)]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)
]
Temperature = Annotated[
    float,
    typer.Option(min=0.0, help="0 takes the likeliest token each time.", rich_help_panel=_ANSWER),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Nucleus sampling.", rich_help_panel=_ANSWER),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="Sample among the k likeliest.", rich_help_panel=_ANSWER),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Drop tokens below this share of the likeliest.",
        rich_help_panel=_ANSWER,
    ),
]
NumBeams = Annotated[
    int, typer.Option(min=1, help="Beam search with so many beams.", rich_help_panel=_ANSWER)
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_ANSWER)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; repeatable.", rich_help_panel=_ANSWER),
]
Seed = Annotated[
    int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_ANSWER)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the answer.")]
