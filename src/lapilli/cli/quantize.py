"""`lapilli quantize`: a checkpoint in 3, 4 or 8 bits, by plain rounding or from samples."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.cli.terminal import Device, SaveOptions, Source, Target, counting, loading, note

if TYPE_CHECKING:
    from lapilli.quant import QuantConfig

Method = Annotated[
    str,
    typer.Option(
        help="rtn rounds to the nearest; gptq, awq, awq-clip (AWQ as published) and mbq look at "
        "samples first, and take minutes."
    ),
]
Bits = Annotated[
    int, typer.Option(help="4 or 8; 3 (zero points or symmetric) is stored as 4 and saves nothing.")
]
GroupSize = Annotated[
    int,
    typer.Option(
        help="Inputs that share a scale: 32, 64 or 128. 0 is 32 at 8 bits, 64 with "
        "nonlinear levels, 128 with the others."
    ),
]
Levels = Annotated[
    str,
    typer.Option(
        help="4 bits: nonlinear (a scale for every 16 inputs), symmetric, or zeros (zero points, "
        "as AWQ has them)."
    ),
]
Activations = Annotated[
    int,
    typer.Option(
        help="8 rounds activations on the fly, 16 leaves them. 0 is 8, and 16 with --format gemm "
        "or llm-awq."
    ),
]
Tower = Annotated[bool, typer.Option("--tower", help="The vision tower too, in 8 bits.")]
Rotate = Annotated[
    bool, typer.Option("--rotate", help="Rotate hidden states first; costs nothing at run time.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Samples: .txt, or .json, .jsonl, ... as lapilli train reads them; else built-in ones."
    ),
]
Samples = Annotated[int | None, typer.Option(help="How many of them; else 32.")]
Images = Annotated[
    str | None,
    typer.Option(help="The folder that image paths of the samples are relative to."),
]
Format = Annotated[
    str,
    typer.Option(
        "--format", help="lapilli, gemm (AutoAWQ's, for transformers and vLLM) or llm-awq."
    ),
]


def quantize(
    source: Source,
    target: Target,
    method: Method = "rtn",
    bits: Bits = 4,
    group_size: GroupSize = 0,
    levels: Levels = "",
    activations: Activations = 0,
    rotate: Rotate = False,
    calibration: Calibration = None,
    samples: Samples = None,
    images: Images = None,
    tower: Tower = False,
    form: Format = "lapilli",
    device: Device = "cpu",
    *,
    how: SaveOptions,
) -> None:
    """Save a checkpoint in 4 or 8 bits; it loads at once and answers faster on a CPU.

    A run from samples that was killed goes on where it was when the same command is repeated.
    """
    config = _config(bits, group_size, levels, activations, form, tower=tower)
    if method == "rtn":
        _refuse_unused(calibration or images, samples, activations, form, device)
        if not rotate and form == "lapilli" and bits != 3:
            _round(source, target, config, how)
            return
    from lapilli.calibration import CalibrationOptions, quantize_from_samples

    given = {"samples": calibration, "number": samples, "images": images}
    more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options = CalibrationOptions(
        method=method, bits=bits, rotate=rotate, form=form, device=device, **more
    )
    say = (lambda _text: None) if how.quiet else note
    with loading(source, quiet=how.quiet) as progress, counting(quiet=how.quiet) as layers:
        quantize_from_samples(
            source,
            target,
            config,
            options,
            overwrite=how.overwrite,
            say=say,
            loading=progress,
            layers=layers,
            base=how.base,
            adapter=how.adapter,
            template=how.template,
        )
    _say(target, config, how, part="3 of " if bits == 3 else "")


def _refuse_unused(
    calibration: str | None, samples: int | None, activations: int, form: str, device: str
) -> None:
    """Refuse options that plain rounding has no use for.

    Raises:
        ConfigError: one of them was given.
    """
    from lapilli.errors import ConfigError

    unused = {
        "--calibration": calibration is not None,
        "--samples": samples is not None,
        "--device": device not in ("cpu", "auto"),
        "--activations": activations == 8 and form != "lapilli",  # such files say nothing of them
    }
    for option, is_given in unused.items():
        if is_given:
            raise ConfigError(
                f"{option} changes nothing with --method rtn: leave it out, or choose gptq, awq, "
                "awq-clip or mbq"
            )


def _config(
    bits: int, group_size: int, levels: str, activations: int, form: str, *, tower: bool
) -> "QuantConfig":
    """Return how layers are stored.

    Raises:
        ConfigError: a value that there is nothing for, or that files of a format cannot have.
    """
    from lapilli.checkpoint.write.awq import FORMS
    from lapilli.errors import ConfigError
    from lapilli.quant import QuantConfig

    is_own = form == "lapilli"
    if form not in ("lapilli", *FORMS):
        raise ConfigError(f"format {form!r} is unknown: choose lapilli, {', '.join(FORMS)}")
    if not is_own and (tower or levels not in ("", "zeros")):
        wrong = "a tower in 8 bits" if tower else f"levels {levels!r}"
        raise ConfigError(f"files of format {form} cannot have {wrong}: leave it out")
    if activations not in (0, 8, 16):
        raise ConfigError(f"activations must be 8 or 16, found {activations}")
    if bits not in (3, 4, 8):
        raise ConfigError(f"bits must be 3, 4 or 8, found {bits}")
    if bits == 8 and levels:
        raise ConfigError(f"--levels {levels} is of 4 bits, and 8 were asked for: leave one out")
    if bits == 3 and levels == "nonlinear":
        raise ConfigError("3 bits have linear levels: choose zeros or symmetric")
    levels = levels or ("nonlinear" if is_own and bits != 3 else "zeros")
    more: dict[str, Any] = {} if is_own else {"head_bits": None, "value_bits": 4}
    return QuantConfig(
        bits=8 if bits == 8 else 4,
        group_size=group_size,
        levels=levels,
        mode="weight_only" if (activations or (8 if is_own else 16)) == 16 else "dynamic",
        quantize_tower=tower,
        **more,
    )


def _round(source: str, target: Path, config: "QuantConfig", how: SaveOptions) -> None:
    """Round every weight to the nearest while it is read."""
    with loading(source, quiet=how.quiet) as progress:
        from lapilli.calibration.partial import open_partial_run
        from lapilli.checkpoint.export import save_loaded
        from lapilli.checkpoint.load import STORED, load_checkpoint
        from lapilli.checkpoint.write.files import check_target
        from lapilli.quant.quantize import notes_on

        place = check_target(target, overwrite=how.overwrite)
        with open_partial_run(place) as unfinished:  # of another method
            unfinished.begin_anew("rtn")
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
    _say(target, config, how)
    if not how.quiet:
        for line in notes_on(dict(loaded.model.named_modules()), config):
            note(line)


def _say(target: Path, config: "QuantConfig", how: SaveOptions, *, part: str = "") -> None:
    """Say how large the files are and what they hold; `part` is of the bits that weights use."""
    if how.quiet:
        return
    from lapilli.quant.quantize import describe

    size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    note(f"{target}: {size / 1e6:.1f} MB, {part}{describe(config)}")
