"""The options that several commands share, each written once. Imports typer and nothing else."""

from pathlib import Path
from typing import Annotated

import typer

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
Temperature = Annotated[
    float,
    typer.Option(min=0.0, help="0 takes the likeliest token each time."),
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Nucleus sampling."),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="Sample among the k likeliest."),
]
MinP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the likeliest."),
]
NumBeams = Annotated[int, typer.Option(min=1, help="Beam search with so many beams.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; repeatable."),
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Speculate = Annotated[
    str, typer.Option(help="Guess tokens ahead and check them: on, off, or auto, while it pays.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the answer.")]
Source = Annotated[str, typer.Argument(help="A directory, a hub id, or pebble.")]
Target = Annotated[Path, typer.Argument(help="The new directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory.")]
