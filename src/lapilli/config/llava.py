"""config.json of the original LLaVA -> ModelConfig.

A flat file: the language model's keys and the `mm_` keys beside them.
"""

import ast
from collections.abc import Sequence
from typing import Literal

from lapilli.config import ignored
from lapilli.config.families import Family, family_by_class, find_family, original_types
from lapilli.config.files import ConfigFiles
from lapilli.config.model import (
    ImageConfig,
    Merge,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.config.projector import parse_projector, tile_features
from lapilli.config.reader import MOST, MOST_POSITIONS, JsonObject, KeyReader, KeyReport, shown
from lapilli.config.tokens import parse_tokens
from lapilli.config.vision import Select, default_pixels, parse_pixels, parse_tower
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.geometry import ImageSize

Side = Literal["left", "right"]

_MOST_PINPOINTS = 1000
_MOST_PIXELS = 1 << 25  # of a resolution: 0.4 GB as float32
_LONGEST_LITERAL = 1 << 14
# What lapilli records in a config.json that it writes, beyond what other programs have a key for.
RECORD_KEY = "lapilli_template"
IMAGE_KEY = "lapilli_image_token_index"  # in the original layout, of a model that came with one
CAP_KEY = "lapilli_logit_softcap"  # in a LLaVA of Hugging Face, see huggingface.py
ROUNDS_KEY = "lapilli_rounds_unpad"  # see ImageConfig.rounds_unpad
MERGES: dict[str, Merge] = {
    "flat": "flat",
    "spatial": "spatial",
    "spatial_unpad": "spatial_unpad",
}
# What transformers writes; "auto" stands in files that were written by hand.
DTYPE_NAMES = (
    *("float32", "float16", "bfloat16", "float64", "float", "half", "double", "auto"),
    *("float8_e4m3fn", "float8_e5m2"),
)
SELECTS: dict[str, Select] = {"patch": "patch", "cls_patch": "cls_patch"}


def inner_family(raw: JsonObject) -> Family:
    """Return the family of the language model: by model type, or in old files by the class."""
    kind = raw.get("model_type")
    found = find_family(kind) if isinstance(kind, str) and kind in original_types() else None
    return found or family_by_class(str(raw.get("architectures", "")))


def named_tower(raw: JsonObject) -> str | None:
    """Return the directory or hub id of the vision tower; None: a model without images."""
    tower = raw.get("mm_vision_tower") or raw.get("vision_tower")
    # Training scripts of 2023 wrote the name as a list of one.
    if isinstance(tower, list) and len(tower) == 1:
        tower = tower[0]
    return tower if isinstance(tower, str) and tower else None


def parse_llava(files: ConfigFiles) -> tuple[ModelConfig, KeyReport]:
    """Parse an original LLaVA checkpoint.

    Raises:
        ConfigError: a key is missing or of the wrong type.
        UnsupportedModelError: a tower, projector or variation that lapilli does not have.
    """
    family = inner_family(files.config)
    reader = KeyReader(files.config, "config.json", family.ignored | ignored.LLAVA)
    text = family.parse(reader)
    generation = KeyReader(files.generation, "generation_config.json", ignored.GENERATION)
    tokens = parse_tokens(reader, generation, image_id=reader.optional_integer(IMAGE_KEY))
    source = named_tower(files.config)
    has_vision = source is not None
    _refuse_multi_scale(reader)
    vision, vision_report = _vision(reader, files) if has_vision else (None, KeyReport())
    image, image_report = _image(reader, files, vision) if vision else (None, KeyReport())
    for key in ("mm_vision_tower", "vision_tower", "architectures", "model_type"):
        reader.value(key)
    torch_dtype = parse_dtype((reader,), ("torch_dtype", "dtype"))
    projector = _projector(reader, vision, text.hidden_size) if vision else None
    config = ModelConfig(
        text=text,
        tokens=tokens,
        vision=vision,
        projector=projector,
        image=image,
        vision_source=source,
        vision_in_checkpoint=reader.flag("unfreeze_mm_vision_tower", False),
        has_newline=bool(image and "unpad" in image.merge),
        layout="llava",
        torch_dtype=torch_dtype,
        max_length=_max_length(reader),
        context_length=reader.positive("max_sequence_length", 2048, most=MOST_POSITIONS),
        padding_side=_padding_side(reader),
        template=reader.text(RECORD_KEY),
    )
    report = reader.report() + generation.report() + vision_report + image_report
    return config, report


def _refuse_multi_scale(reader: KeyReader) -> None:
    scales = reader.value("s2_scales")
    if reader.flag("s2", False):
        raise UnsupportedModelError(
            f"config.json: s2 is true (a tower at the scales {shown(scales)}), which is not "
            "supported"
        )


def _vision(reader: KeyReader, files: ConfigFiles) -> tuple[VisionConfig, KeyReport]:
    if files.tower is None:
        raise ConfigError(
            f"the configuration of the vision tower {shown(named_tower(reader.raw))} "
            "is needed, but none was found"
        )
    layer = reader.optional_integer("mm_vision_select_layer")
    if layer is None:
        raise ConfigError(
            "config.json: mm_vision_select_layer is missing, expected the number of a hidden state "
            "such as -2"
        )
    select = reader.text("mm_vision_select_feature", "patch")
    if select not in SELECTS:
        raise ConfigError(
            f"config.json: mm_vision_select_feature is {select!r}, choose from {', '.join(SELECTS)}"
        )
    tower = KeyReader(
        files.tower, "config.json of the vision tower", ignored.VISION, "vision_tower:"
    )
    vision = parse_tower(tower, feature_layer=layer, feature_select=SELECTS[select])
    width = reader.integer("mm_hidden_size", vision.hidden_size)
    if width != vision.hidden_size:
        raise ConfigError(
            f"config.json: mm_hidden_size is {width}, but the vision tower has hidden_size "
            f"{vision.hidden_size}: this is another tower than the checkpoint was trained with"
        )
    return vision, tower.report()


def _projector(reader: KeyReader, vision: VisionConfig, hidden_size: int) -> ProjectorConfig:
    name = reader.text("mm_projector_type", "linear")
    projector = parse_projector(name, vision_size=vision.hidden_size, hidden_size=hidden_size)
    tile_features(vision, projector)  # refuses what cannot be pooled
    return projector


def _image(
    reader: KeyReader, files: ConfigFiles, vision: VisionConfig
) -> tuple[ImageConfig, KeyReport]:
    aspect = reader.text("image_aspect_ratio", "square")
    merge = reader.text("mm_patch_merge_type", "flat")
    pinpoints = parse_pinpoints(reader.value("image_grid_pinpoints"), width_first=True)
    if merge not in MERGES:
        raise UnsupportedModelError(
            f"config.json: mm_patch_merge_type {merge!r} is not supported, "
            f"choose from {', '.join(MERGES)}"
        )
    pixels, report = default_pixels(vision), KeyReport()
    if files.preprocessor is not None:
        preprocessor = KeyReader(
            files.preprocessor, "preprocessor_config.json", ignored.PREPROCESSOR, "preprocessor:"
        )
        pixels = parse_pixels(preprocessor, vision)
        report = preprocessor.report()
    image = ImageConfig(
        pixels=pixels,
        aspect=aspect,
        merge=MERGES[merge],
        pinpoints=pinpoints,
        rounds_unpad=reader.flag(ROUNDS_KEY, False),
    )
    return image, report


def parse_pinpoints(value: object, *, width_first: bool) -> tuple[ImageSize, ...]:
    """Return resolutions, from a list of pairs or its literal in a string.

    Args:
        value: the list, a string such as "[[336, 672], [672, 336]]", or None.
        width_first: pairs are (width, height) as in the original, else (height, width).

    Raises:
        ConfigError: anything else.
    """
    if value is None:
        return ()
    found = _literal(value) if isinstance(value, str) else value
    pairs = found if isinstance(found, list | tuple) else [found]
    if len(pairs) > _MOST_PINPOINTS:
        raise ConfigError(
            f"config.json: image_grid_pinpoints has {len(pairs)} resolutions, expected at most "
            f"{_MOST_PINPOINTS}"
        )
    sizes: list[ImageSize] = []
    for pair in pairs:
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(type(side) is int and side > 0 for side in pair)
        ):
            raise ConfigError(
                "config.json: image_grid_pinpoints must be a list of pairs of pixels, got "
                f"{shown(pair)}"
            )
        first, second = pair
        if first * second > _MOST_PIXELS:
            raise ConfigError(
                f"config.json: image_grid_pinpoints has the resolution {shown(pair)}, expected at "
                f"most {_MOST_PIXELS} pixels"
            )
        sizes.append(ImageSize(second, first) if width_first else ImageSize(first, second))
    return tuple(sizes)


def parse_dtype(
    readers: Sequence[KeyReader], keys: Sequence[str] = ("dtype", "torch_dtype")
) -> str | None:
    """Return the number format that a checkpoint says that it was saved in, the first of several.

    Raises:
        ConfigError: no number format of weights has the name.
    """
    first = None
    for reader in readers:
        for key in keys:
            name = reader.text(key)
            if name is not None and name.removeprefix("torch.") not in DTYPE_NAMES:
                raise ConfigError(
                    f"{reader.where}: {reader.prefix}{key} is {shown(name)}, choose from "
                    f"{', '.join(DTYPE_NAMES)}"
                )
            first = first or name
    return first


def _literal(text: str) -> object:
    """Return the list that a string spells."""
    try:
        return ast.literal_eval(text if len(text) < _LONGEST_LITERAL else "")
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"config.json: image_grid_pinpoints is not a list: {shown(text)}"
        ) from error


def _max_length(reader: KeyReader) -> int | None:
    """Return the longest fused row; transformers writes 1e30 for "no limit"."""
    found = reader.optional_number("tokenizer_model_max_length", least=1.0, most=1e300)
    return None if found is None or found > MOST else int(found)


def _padding_side(reader: KeyReader) -> Side:
    side = reader.text("tokenizer_padding_side", "right")
    if side == "left":
        return "left"
    if side == "right":
        return "right"
    raise ConfigError(f"config.json: tokenizer_padding_side is {side!r}, choose from left, right")
