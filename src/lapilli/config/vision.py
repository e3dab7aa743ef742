"""config.json and preprocessor_config.json of a vision tower -> VisionConfig and PixelConfig.

Defaults are those of the transformers library, which leaves default values out of its files.
"""

from dataclasses import dataclass
from typing import Literal

from lapilli.config.families import COMMON_KEYS, keys_of
from lapilli.config.families.decoder import parse_activation
from lapilli.config.model import PixelConfig, VisionConfig
from lapilli.config.reader import (
    MOST_HEADS,
    MOST_LAYERS,
    MOST_PIXELS,
    MOST_WIDTH,
    JsonObject,
    KeyReader,
    is_object,
)
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.geometry import ImageSize

_MOST_PATCHES = 1 << 16
_LAST_FILTER = 5
Family = Literal["clip", "siglip"]
Select = Literal["patch", "cls_patch", "drop_first"]

# Keys of a tower's config.json and of preprocessor_config.json that are knowingly not read.
TOWER_IGNORED = COMMON_KEYS | keys_of("""
    bos_token_id dtype eos_token_id logit_scale_init_value pad_token_id projection_dim text_config
    text_config_dict tie_word_embeddings torch_dtype vision_use_head vocab_size
""")
_IGNORED_OF_PIXELS = keys_of("""
    _valid_processor_keys aspect_ratio_setting auto_map background_color data_format
    default_to_square device disable_grouping do_convert_rgb feature_extractor_type
    image_grid_pinpoints image_processor_type input_data_format pad_size processor_class
    return_tensors
""")

# The type of the tower's own file, the type inside a two-tower file, and the family.
TOWER_TYPES: dict[str, Family] = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerDefaults:
    """Values of a family for keys that its file leaves out."""

    patch_size: int
    norm_eps: float
    activation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


TOWERS: dict[Family, TowerDefaults] = {
    "clip": TowerDefaults(
        patch_size=32,
        norm_eps=1e-5,
        activation="quick_gelu",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
    "siglip": TowerDefaults(
        patch_size=16,
        norm_eps=1e-6,
        activation="gelu_pytorch_tanh",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
}

# Hugging Face's LLaVA without vision_config means the large CLIP at 336 pixels.
LARGE_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def tower_section(reader: KeyReader) -> KeyReader:
    """Return the keys of the vision half: the file itself, or its `vision_config` (two towers)."""
    if not reader.has("vision_config"):
        return reader
    # Old two-tower files repeat the section; where both differ, the repetition counts.
    section, repeated = reader.value("vision_config"), reader.value("vision_config_dict")
    merged = {**_object(section), **_object(repeated)}
    child = KeyReader(merged, reader.where, TOWER_IGNORED, f"{reader.prefix}vision_config.")
    reader.children.append(child)
    return child


def _object(value: object) -> JsonObject:
    return value if is_object(value) else {}


def parse_tower(
    reader: KeyReader, *, feature_layer: int = -2, feature_select: Select = "patch"
) -> VisionConfig:
    """Return the tower that the reader's keys describe.

    The keys are those of a tower's own config.json (vision only or two towers) or of a
    `vision_config`. `feature_layer` is an index into the hidden states, the embeddings' output
    being number 0.

    Raises:
        ConfigError: a key is of the wrong type, or the layer does not exist.
        UnsupportedModelError: not a CLIP or SigLIP tower.
    """
    outer = reader.text("model_type")
    section = tower_section(reader)
    kind = section.text("model_type", outer or "clip_vision_model")
    if kind not in TOWER_TYPES:
        raise UnsupportedModelError(
            f"{reader.where}: vision tower type {kind!r} is not supported, "
            f"choose from {', '.join(TOWER_TYPES)}"
        )
    family = TOWER_TYPES[kind]
    defaults = TOWERS[family]
    num_layers = section.positive("num_hidden_layers", 12, most=MOST_LAYERS)
    if not -num_layers - 1 <= feature_layer <= num_layers:
        raise ConfigError(
            f"{reader.where}: the feature layer {feature_layer} does not exist, the tower has "
            f"{num_layers} layers and {num_layers + 1} hidden states"
        )
    image_size = section.positive("image_size", 224, most=MOST_PIXELS)
    patch_size = section.positive("patch_size", defaults.patch_size, most=MOST_PIXELS)
    if not 1 <= (image_size // patch_size) ** 2 <= _MOST_PATCHES:
        raise ConfigError(
            f"{reader.where}: image_size {image_size} has {image_size // patch_size} patches of "
            f"patch_size {patch_size} on a side, expected 1 to {int(_MOST_PATCHES**0.5)}"
        )
    hidden_size = section.positive("hidden_size", 768, most=MOST_WIDTH)
    num_heads = section.positive("num_attention_heads", 12, most=MOST_HEADS)
    if hidden_size % num_heads:
        raise ConfigError(
            f"{reader.where}: hidden_size {hidden_size} of the vision tower is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    return VisionConfig(
        family=family,
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=section.positive("intermediate_size", 3072, most=MOST_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_channels=_three_channels(section),
        norm_eps=section.number("layer_norm_eps", defaults.norm_eps, least=0.0, most=1.0),
        activation=parse_activation(section, "hidden_act", defaults.activation),
        feature_layer=feature_layer,
        feature_select=feature_select,
    )


def _three_channels(section: KeyReader) -> int:
    found = section.positive("num_channels", 3)
    if found != 3:
        raise UnsupportedModelError(
            f"{section.where}: num_channels {found} is not supported, expected 3: pictures are RGB"
        )
    return found


def _default_pixels(vision: VisionConfig) -> PixelConfig:
    """Return preprocessing for a missing preprocessor_config.json, by the tower and its family."""
    defaults = TOWERS[vision.family]
    side = ImageSize(vision.image_size, vision.image_size)
    squeezes = vision.family == "siglip"
    return PixelConfig(
        crop_size=side,
        shortest_edge=None if squeezes else vision.image_size,
        resize_to=side if squeezes else None,
        do_center_crop=not squeezes,
        mean=defaults.mean,
        std=defaults.std,
    )


def parse_pixels(raw: JsonObject | None, vision: VisionConfig) -> tuple[PixelConfig, KeyReader]:
    """Parse the steps from one tile to numbers; return the reader of their file too.

    Without preprocessor_config.json, and for keys that it leaves out, the family of the tower
    decides.

    Raises:
        ConfigError: a key is of the wrong type, or a tile does not fit the tower.
    """
    reader = KeyReader(raw or {}, "preprocessor_config.json", _IGNORED_OF_PIXELS, "preprocessor:")
    if raw is None:
        return _default_pixels(vision), reader
    name = reader.text("image_processor_type") or reader.text("feature_extractor_type") or ""
    squeezes = "siglip" in name.lower() or (not name and vision.family == "siglip")
    defaults = TOWERS["siglip" if squeezes else "clip"]
    size = _size(reader, "size")
    if size is None:
        size = ImageSize(224, 224) if squeezes else 224
    do_center_crop = reader.flag("do_center_crop", not squeezes)
    crop = _size(reader, "crop_size")
    crop_size = ImageSize(crop, crop) if isinstance(crop, int) else crop or ImageSize(224, 224)
    if not do_center_crop and isinstance(size, ImageSize):
        crop_size = size
    pixels = PixelConfig(
        crop_size=crop_size,
        shortest_edge=size if isinstance(size, int) else None,
        resize_to=size if isinstance(size, ImageSize) else None,
        do_resize=reader.flag("do_resize", True),
        do_center_crop=do_center_crop,
        do_rescale=reader.flag("do_rescale", True),
        rescale_factor=reader.number("rescale_factor", 1 / 255, least=-1e6, most=1e6),
        do_normalize=reader.flag("do_normalize", True),
        mean=_colours(reader, "image_mean", defaults.mean),
        std=_colours(reader, "image_std", defaults.std, least=1e-6),
        resample=_resample(reader),
    )
    if pixels.crop_size != (vision.image_size, vision.image_size):
        raise ConfigError(
            f"{reader.where}: tiles of {pixels.crop_size} do not fit the vision tower, "
            f"which expects {vision.image_size}x{vision.image_size}"
        )
    return pixels, reader


def _size(reader: KeyReader, key: str) -> int | ImageSize | None:
    """Read a number as the shortest edge (or both sides of a crop); an object says which it is."""
    value = reader.value(key)
    if value is None:
        return None
    if is_object(value):
        sides = KeyReader(value, reader.where, prefix=f"{reader.prefix}{key}.")
        reader.children.append(sides)
        if sides.has("shortest_edge"):
            return sides.positive("shortest_edge", most=MOST_PIXELS)
        height, width = (sides.positive(side, most=MOST_PIXELS) for side in ("height", "width"))
        return ImageSize(height, width)
    if isinstance(value, list) and len(value) == 2:
        named = KeyReader(dict(zip(("height", "width"), value, strict=True)), reader.where)
        return ImageSize(*(named.positive(side, most=MOST_PIXELS) for side in named.raw))
    return reader.positive(key, most=MOST_PIXELS)


def _resample(reader: KeyReader) -> int:
    """Return the number of one of Pillow's filters."""
    found = reader.integer("resample", 3)
    if not 0 <= found <= _LAST_FILTER:
        raise ConfigError(
            f"{reader.where}: resample must be a filter of Pillow from 0 to {_LAST_FILTER}, "
            f"got {found}"
        )
    return found


def _colours(
    reader: KeyReader, key: str, default: tuple[float, float, float], *, least: float = -1e6
) -> tuple[float, float, float]:
    found = reader.numbers(key, 3, least=least, most=1e6)
    if found is None:
        return default
    red, green, blue = found
    return red, green, blue
