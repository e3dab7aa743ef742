"""config.json of the original LLaVA -> ModelConfig, and what other layouts write as it does.

A flat file: the language model's keys and the `mm_` keys beside them.
"""

import ast
import reprlib
from collections.abc import Sequence
from typing import Literal

from lapilli.config.families import (
    COMMON_KEYS,
    Family,
    family_by_class,
    find_family,
    keys_of,
    original_types,
)
from lapilli.config.modalities import parse_modalities
from lapilli.config.model import (
    ImageConfig,
    Merge,
    ModelConfig,
    ProjectorConfig,
    TokenConfig,
    VisionConfig,
)
from lapilli.config.projector import parse_projector, tile_features
from lapilli.config.reader import (
    MOST,
    MOST_POSITIONS,
    JsonObject,
    KeyReader,
    KeyReport,
    shown,
)
from lapilli.config.vision import TOWER_IGNORED, Select, parse_pixels, parse_tower
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.geometry import ImageSize

SIDES: dict[str, Literal["left", "right"]] = {"left": "left", "right": "right"}

_MOST_PINPOINTS = 1000
_MOST_PIXELS = 1 << 25  # of a resolution: 0.4 GB as float32
_LONGEST_LITERAL = 1 << 14
# What lapilli records in a config.json that it writes, beyond what other programs have a key for.
RECORD_KEY = "lapilli_template"
IMAGE_KEY = "lapilli_image_token_index"  # in the original layout, of a model that came with one
CAP_KEY = "lapilli_logit_softcap"  # in a LLaVA of Hugging Face, see parse.py
ROUNDS_KEY = "lapilli_rounds_unpad"  # see ImageConfig.rounds_unpad
MERGES: dict[str, Merge] = {
    "flat": "flat",
    "spatial": "spatial",
    "spatial_unpad": "spatial_unpad",
}
# Read by the original's training code only, or by branches that it never released.
_IGNORED = keys_of("""
    freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_split_resolution
    mm_patch_token mm_projector_lr mm_resampler_type mm_vision_tower_lr pretrain_mm_mlp_adapter
    tune_mm_mlp_adapter tune_mm_vision_resampler use_mm_proj vision_use_head
""")
# What transformers writes; "auto" stands in files that were written by hand.
DTYPE_NAMES = (
    *("float32", "float16", "bfloat16", "float64", "float", "half", "double", "auto"),
    *("float8_e4m3fn", "float8_e5m2"),
)
# Values with which each of these leaves an answer as it is; any other changes even greedy answers.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
}
SELECTS: dict[str, Select] = {"patch": "patch", "cls_patch": "cls_patch"}


def is_hf_llava(raw: JsonObject) -> bool:
    """Return whether a file is Hugging Face's LLaVA: nested, without the original's flat keys."""
    if raw.get("model_type") not in ("llava", "llava_next"):
        return False
    nested = "text_config" in raw or "vision_config" in raw
    return nested or "ForConditionalGeneration" in str(raw.get("architectures", ""))


def is_original(raw: JsonObject) -> bool:
    """Return whether a file is of the original LLaVA: flat, with `mm_` keys.

    Note:
        Releases of 2023 say `llava`, like Hugging Face's own class; the shape of the file decides.
    """
    kind = raw.get("model_type")
    return kind in tuple(original_types()) or (kind == "llava" and not is_hf_llava(raw))


def inner_family(raw: JsonObject) -> Family:
    """Return the family of the language model: by model type, or in old files by the class."""
    kind = raw.get("model_type")
    found = find_family(kind) if isinstance(kind, str) and kind in original_types() else None
    return found or family_by_class(str(raw.get("architectures", "")))


def named_tower(raw: JsonObject) -> str | None:
    """Return the directory or hub id of a separate vision tower, if there is one to fetch."""
    tower = (raw.get("mm_vision_tower") or raw.get("vision_tower")) if is_original(raw) else None
    # Training scripts of 2023 wrote the name as a list of one.
    if isinstance(tower, list) and len(tower) == 1:
        tower = tower[0]
    return tower if isinstance(tower, str) and tower else None


def parse_llava(
    raw: JsonObject,
    *,
    tower: JsonObject | None,
    preprocessor: JsonObject | None,
    generation: JsonObject | None,
) -> tuple[ModelConfig, KeyReport]:
    """Parse an original LLaVA checkpoint; see `parse_config`.

    Raises:
        ConfigError: a key is missing or of the wrong type.
        UnsupportedModelError: a tower, projector or variation that lapilli does not have.
    """
    family = inner_family(raw)
    reader = KeyReader(raw, "config.json", family.ignored | _IGNORED)
    text = family.parse(reader)
    image_id = reader.optional_integer(IMAGE_KEY)
    tokens, token_report = parse_tokens(reader, generation, image_id=image_id)
    source = named_tower(raw)
    _refuse_multi_scale(reader)
    vision, vision_report = _vision(reader, tower) if source else (None, KeyReport())
    image, image_report = _image(reader, preprocessor, vision) if vision else (None, KeyReport())
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
        modalities=parse_modalities(reader),
        layout="llava",
        torch_dtype=torch_dtype,
        max_length=_max_length(reader),
        context_length=reader.positive("max_sequence_length", 2048, most=MOST_POSITIONS),
        padding_side=reader.choice("tokenizer_padding_side", "right", SIDES),
        template=reader.text(RECORD_KEY),
    )
    report = reader.report() + token_report + vision_report + image_report
    return config, report


def _refuse_multi_scale(reader: KeyReader) -> None:
    scales = reader.value("s2_scales")
    if reader.flag("s2", False):
        raise UnsupportedModelError(
            f"config.json: s2 is true (a tower at the scales {shown(scales)}), which is not "
            "supported"
        )


def _vision(reader: KeyReader, raw: JsonObject | None) -> tuple[VisionConfig, KeyReport]:
    if raw is None:
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
    select = reader.choice("mm_vision_select_feature", "patch", SELECTS)
    tower = KeyReader(raw, "config.json of the vision tower", TOWER_IGNORED, "vision_tower:")
    vision = parse_tower(tower, feature_layer=layer, feature_select=select)
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
    reader: KeyReader, preprocessor: JsonObject | None, vision: VisionConfig
) -> tuple[ImageConfig, KeyReport]:
    aspect = reader.text("image_aspect_ratio", "square")
    merge = reader.text("mm_patch_merge_type", "flat")
    pinpoints = parse_pinpoints(reader.value("image_grid_pinpoints"), width_first=True)
    if merge not in MERGES:
        raise UnsupportedModelError(
            f"config.json: mm_patch_merge_type {merge!r} is not supported, "
            f"choose from {', '.join(MERGES)}"
        )
    pixels, steps = parse_pixels(preprocessor, vision)
    image = ImageConfig(
        pixels=pixels,
        aspect=aspect,
        merge=MERGES[merge],
        pinpoints=pinpoints,
        rounds_unpad=reader.flag(ROUNDS_KEY, False),
    )
    return image, steps.report()


def parse_pinpoints(value: object, *, width_first: bool) -> tuple[ImageSize, ...]:
    """Return resolutions, from a list of pairs or its literal in a string.

    Pairs are (width, height) with `width_first`, as in the original, else (height, width).

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


def parse_tokens(
    reader: KeyReader, generation: JsonObject | None, *, image_id: int | None = None
) -> tuple[TokenConfig, KeyReport]:
    """Return the special ids that the files agree on, and what became of generation_config.json.

    `reader` has the keys of the language model's config.json or `text_config`;
    generation_config.json wins over them. `image_id` is the vocabulary entry that stands for a
    picture.

    Note:
        `mm_use_im_patch_token` is true when absent: the original then adds one token at loading.
    """
    wins = KeyReader(
        generation or {}, "generation_config.json", COMMON_KEYS | {"trust_remote_code"}
    )
    found = []
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        both = wins.ids(key), reader.ids(key)  # both are read, so that both keys count as used
        known = [[one for one in ids if one >= 0] for ids in both]  # some files say "none" by -1
        found.append(known[0] or known[1])
    bos, eos, pad = found
    tokens = TokenConfig(
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(eos),
        pad_id=pad[0] if pad else None,
        image_id=image_id,
        use_start_end=reader.flag("mm_use_im_start_end", False),
        use_patch_token=reader.flag("mm_use_im_patch_token", True),
    )
    return tokens, wins.report()


class SamplingNote(str):
    """A note that tokens are chosen otherwise than generation_config.json asks for."""

    __slots__ = ()


def sampling_notes(generation: JsonObject) -> tuple[SamplingNote, ...]:
    """Return a line for each setting of generation_config.json that transformers would follow.

    What a person asks for decides how lapilli answers, as in the original's own programs. A file
    that asks for something else is told of: with it transformers gives other tokens.
    """
    return tuple(
        SamplingNote(
            f"generation_config.json asks for {key} = {reprlib.repr(value)}, which is not applied: "
            "only what you ask for yourself changes how tokens are chosen"
        )
        for key, value in sorted(generation.items())
        if key in _NEUTRAL and value not in _NEUTRAL[key]
    )


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
