"""`lapilli build`: a LLaVA out of a language model and a vision tower, or one with more modalities.

--vision joins a tower with a fresh projector; --modality declares what else the model shall read.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lapilli.cli.terminal import Overwrite, Quiet, note
from lapilli.config.families import text_types
from lapilli.config.reader import parse_json
from lapilli.errors import ConfigError

Out = Annotated[Path, typer.Argument(help="The new directory.")]
Language = Annotated[
    str,
    typer.Option(
        help=f"Language model: a directory or a hub id ({', '.join(text_types())}). "
        "Without --vision a LLaVA will do too."
    ),
]
Vision = Annotated[
    str | None,
    typer.Option(help="Vision tower: a directory or a hub id (CLIP, SigLIP), or pebble."),
]
Added = Annotated[
    list[str] | None,
    typer.Option(
        "--modality",
        help="""NAME=SETTINGS in JSON: 'user={"kind": "vector", "width": 64}'; repeatable.""",
    ),
]
AddedFile = Annotated[
    Path | None,
    typer.Option("--modalities", help="The same in a TOML or JSON file: a table for each name."),
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
    vision: Vision = None,
    modality: Added = None,
    modalities: AddedFile = None,
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
    """Join a language model with a vision tower, with modalities of other kinds, or with both.

    What is new begins with fresh weights, ready to be trained.
    """
    from lapilli.train.build import Joint, add_modalities, build_llava

    added = _added(modality or [], modalities)
    if vision is None:
        if not added:
            raise ConfigError("nothing is added to the language model: give --vision or --modality")
        add_modalities(language, out, added, seed=seed, overwrite=overwrite)
        if not quiet:
            names = ", ".join(added)
            note(f"{out}: nothing is known of {names} yet; train it with `lapilli train`")
        return
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
        modalities=added,
    )
    if not quiet:
        for line in built.notes:
            note(line)
        note(f"template {built.template}: {built.reason}")
        note(f"{out}: its projector knows nothing yet; train it with `lapilli train`")


def _added(options: Sequence[str], file: Path | None) -> dict[str, object]:
    """Return the settings of the modalities by name.

    Raises:
        ConfigError: no NAME=SETTINGS, no JSON or TOML, or a name twice.
    """
    found: dict[str, object] = {} if file is None else dict(_tables(file))
    for option in options:
        name, is_pair, text = option.partition("=")
        if not is_pair:
            raise ConfigError(f"--modality {option!r}: expected NAME=SETTINGS, SETTINGS in JSON")
        if name in found:
            raise ConfigError(f"the modality {name!r} is given twice")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--modality {name}: the settings are no JSON: {error}") from error
    return found


def _tables(file: Path) -> Mapping[str, object]:
    data = file.read_bytes()
    if file.suffix.lower() == ".json":
        found = parse_json(data, str(file), unique=True)
        if not isinstance(found, dict):
            raise ConfigError(f"{file} holds no object: expected a table for each modality")
        return found
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
