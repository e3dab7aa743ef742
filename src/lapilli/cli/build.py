"""`lapilli build`: a LLaVA with a fresh projector out of a language model and a vision tower."""

from pathlib import Path
from typing import Annotated

import typer

from lapilli.cli.terminal import Overwrite, Quiet, note
from lapilli.config.families import text_types

Out = Annotated[Path, typer.Argument(help="The new directory.")]
Language = Annotated[
    str, typer.Option(help=f"Language model: a directory or a hub id ({', '.join(text_types())}).")
]
Vision = Annotated[
    str, typer.Option(help="Vision tower: a directory or a hub id (CLIP, SigLIP), or pebble.")
]
Projector = Annotated[str, typer.Option(help="mlp2x_gelu, linear, pool2x2_mlp2x_gelu ...")]
Template = Annotated[
    str | None,
    typer.Option(help="Conversation template; by default the one that the language model speaks."),
]
SelectLayer = Annotated[int, typer.Option(help="Hidden state of the tower that is taken.")]
SelectFeature = Annotated[str, typer.Option(help="patch, or cls_patch with the class token.")]
Aspect = Annotated[str, typer.Option(help="How a picture becomes tiles: pad, square or anyres.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; by default as the language model's."),
]
Tower = Annotated[
    str | None,
    typer.Option(help="Where the tower goes: beside, inside, or named only (a hub id is named)."),
]
Seed = Annotated[int, typer.Option(help="Of the projector.")]
StartEnd = Annotated[
    bool, typer.Option("--start-end", help="Put pictures between <im_start> and <im_end>.")
]
PatchToken = Annotated[bool, typer.Option("--patch-token", help="Add <im_patch>, as LLaVA 1 had.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Take a template that contradicts the language model's own."),
]


def build(
    out: Out,
    language: Language,
    vision: Vision,
    projector: Projector = "mlp2x_gelu",
    template: Template = None,
    select_layer: SelectLayer = -2,
    select_feature: SelectFeature = "patch",
    aspect: Aspect = "pad",
    dtype: Dtype = None,
    tower: Tower = None,
    seed: Seed = 0,
    start_end: StartEnd = False,
    patch_token: PatchToken = False,
    force: Force = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Join a language model and a vision tower with a fresh projector, ready to be trained."""
    from lapilli.train.build import Joint, build_llava

    built = build_llava(
        language,
        vision,
        out,
        joint=Joint(
            projector=projector,
            select_layer=select_layer,
            select_feature=select_feature,
            aspect=aspect,
            use_start_end=start_end,
            use_patch_token=patch_token,
            seed=seed,
        ),
        template=template,
        dtype=dtype,
        tower=tower,
        force=force,
        overwrite=overwrite,
    )
    if not quiet:
        for line in built.notes:
            note(line)
        note(f"template {built.template}: {built.reason}")
        note(f"{out}: its projector knows nothing yet; train it with `lapilli train`")
