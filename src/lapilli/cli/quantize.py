"""`lapilli quantize`: a checkpoint in 4 or 8 bits, for CPUs."""

from typing import Annotated

import typer

from lapilli.cli.terminal import SaveOptions, Source, Target, loading, note

Bits = Annotated[int, typer.Option(help="4 or 8.")]
GroupSize = Annotated[
    int,
    typer.Option(help="Inputs that share a scale: 32, 64 or 128. 0 is 32 at 8 bits, 128 at 4."),
]
Levels = Annotated[
    str,
    typer.Option(
        help="4 bits: nonlinear (a scale for every 16 inputs), symmetric, or zeros (zero points, "
        "as AWQ has them)."
    ),
]
Mode = Annotated[
    str, typer.Option(help="dynamic rounds activations to 8 bits, weight_only does not.")
]
Tower = Annotated[bool, typer.Option("--tower", help="The vision tower too, in 8 bits.")]


def quantize(
    source: Source,
    target: Target,
    bits: Bits = 4,
    group_size: GroupSize = 0,
    levels: Levels = "nonlinear",
    mode: Mode = "dynamic",
    tower: Tower = False,
    *,
    how: SaveOptions,
) -> None:
    """Save a checkpoint in 4 or 8 bits; it loads at once and answers faster on a CPU."""
    with loading(source, quiet=how.quiet) as progress:
        from lapilli.checkpoint.export import save_loaded
        from lapilli.checkpoint.load import STORED, load_checkpoint
        from lapilli.checkpoint.write.files import check_target
        from lapilli.quant import QuantConfig
        from lapilli.quant.quantize import describe, notes_on

        check_target(target, overwrite=how.overwrite)
        config = QuantConfig(
            bits=bits,
            group_size=group_size,
            levels=levels,
            mode=mode,
            quantize_tower=tower,
        )
        loaded = load_checkpoint(
            source,
            base=how.base,
            adapter=how.adapter,
            template=how.template,
            device="cpu",
            dtype=STORED,
            quantization=config,
            progress=progress,
        )
    save_loaded(target, loaded, quantization=config, overwrite=how.overwrite)
    if not how.quiet:
        size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
        note(f"{target}: {size / 1e6:.1f} MB, {describe(config)}")
        for line in notes_on(dict(loaded.model.named_modules()), config):
            note(line)
