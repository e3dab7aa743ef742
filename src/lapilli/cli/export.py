"""`lapilli export`: any checkpoint in another layout or number format, adapters folded in."""

from typing import Annotated

import typer

from lapilli.cli import options
from lapilli.cli.terminal import loading, note, plain_errors

Layout = Annotated[
    str,
    typer.Option(help="llava, as the original, or huggingface (LlavaForConditionalGeneration)."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default as in the files.")
]


def export(
    source: options.Source,
    target: options.Target,
    layout: Layout = "llava",
    dtype: Dtype = None,
    template: options.Template = None,
    base: options.Base = None,
    adapter: options.Adapter = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Save a checkpoint for other programs: one folder with everything, adapters folded in."""
    with plain_errors():
        with loading(source, quiet=quiet) as progress:
            from lapilli.checkpoint.export import export_checkpoint

            stored = export_checkpoint(
                source,
                target,
                layout=layout,
                dtype=dtype,
                template=template,
                base=base,
                adapter=adapter,
                overwrite=overwrite,
                progress=progress,
            )
        if not quiet:
            note(f"{target}: {layout}, {stored}")
