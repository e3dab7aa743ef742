"""`lapilli export`: any checkpoint in another layout or number format, adapters folded in."""

from typing import Annotated

import typer

from lapilli.cli.terminal import SaveOptions, Source, Target, loading, note

Layout = Annotated[
    str,
    typer.Option(help="llava, as the original, or huggingface (LlavaForConditionalGeneration)."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default as in the files.")
]


def export(
    source: Source,
    target: Target,
    layout: Layout = "llava",
    dtype: Dtype = None,
    *,
    how: SaveOptions,
) -> None:
    """Save a checkpoint for other programs: one folder with everything, adapters folded in."""
    with loading(source, quiet=how.quiet) as progress:
        from lapilli.checkpoint.export import export_checkpoint

        stored = export_checkpoint(
            source,
            target,
            layout=layout,
            dtype=dtype,
            template=how.template,
            base=how.base,
            adapter=how.adapter,
            overwrite=how.overwrite,
            progress=progress,
        )
    if not how.quiet:
        note(f"{target}: {layout}, {stored}")
