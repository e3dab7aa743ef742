"""config.json of a checkpoint -> ModelConfig, by what its files say and never by a folder's name.

Here are Hugging Face's LLaVA 1.5 and LLaVA-NeXT, and language models without pictures. The flat
file of the original is llava.py; families/ read the language model inside of each.
"""

from dataclasses import replace

from lapilli.config.families import (
    COMMON_KEYS,
    Family,
    family_named,
    keys_of,
    original_types,
    text_types,
)
from lapilli.config.families.decoder import parse_activation
from lapilli.config.llava import (
    CAP_KEY,
    RECORD_KEY,
    inner_family,
    is_hf_llava,
    is_original,
    parse_dtype,
    parse_llava,
    parse_pinpoints,
    parse_tokens,
)
from lapilli.config.modalities import parse_modalities
from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    ProjectorConfig,
    TextConfig,
    VisionConfig,
)
from lapilli.config.reader import JsonObject, KeyReader, KeyReport, in_file, shown
from lapilli.config.vision import (
    LARGE_CLIP,
    TOWER_IGNORED,
    Select,
    parse_pixels,
    parse_tower,
)
from lapilli.errors import ConfigError, UnsupportedModelError

_IGNORED = COMMON_KEYS | keys_of("""
    bos_token_id eos_token_id hidden_size ignore_index image_seq_length pad_token_id vocab_size
""")


def supported_types() -> tuple[str, ...]:
    """Return every model_type of a config.json that is read here."""
    return ("llava", *original_types(), "llava_next", *text_types())


def parse_config(
    raw: JsonObject,
    *,
    tower: JsonObject | None = None,
    preprocessor: JsonObject | None = None,
    generation: JsonObject | None = None,
    weight_names: frozenset[str] = frozenset(),
) -> tuple[ModelConfig, KeyReport]:
    """Return what a checkpoint is, and what became of every key of its files.

    Args:
        raw: config.json.
        tower: config.json of the vision tower that `named_tower(raw)` names.
        preprocessor: preprocessor_config.json, or the image part of processor_config.json.
        generation: generation_config.json.
        weight_names: names of the checkpoint's tensors, where they are known cheaply.

    Raises:
        ConfigFileError: a key is missing, of the wrong type, or contradicts another.
        UnsupportedModelError: the model type, or a variation of it, is not one of ours.
    """
    with in_file():
        if is_original(raw):
            return parse_llava(raw, tower=tower, preprocessor=preprocessor, generation=generation)
        if is_hf_llava(raw):
            return _parse_hf_llava(raw, preprocessor, generation, weight_names)
        kind = raw.get("model_type")
        if isinstance(kind, str) and kind in text_types():
            return _parse_language_model(raw, generation)
    raise UnsupportedModelError(
        f"config.json: model_type {shown(kind)} is not supported, choose from "
        f"{', '.join(supported_types())}"
    )


def parse_text_config(raw: JsonObject) -> TextConfig:
    """Return the language model inside any supported config.json, without looking at its images.

    Raises:
        ConfigFileError: a key is missing or of the wrong type.
        UnsupportedModelError: a language model that lapilli does not have.
    """
    reader = KeyReader(raw, "config.json")
    with in_file():
        if is_original(raw):
            return inner_family(raw).parse(reader)
        if is_hf_llava(raw):
            reader = reader.child("text_config")
            return family_named(reader.text("model_type", "llama")).parse(reader)
        return family_named(reader.text("model_type")).parse(reader)


STRATEGIES: dict[str, Select] = {"default": "drop_first", "full": "cls_patch"}
DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _parse_hf_llava(
    raw: JsonObject,
    preprocessor: JsonObject | None,
    generation: JsonObject | None,
    weight_names: frozenset[str],
) -> tuple[ModelConfig, KeyReport]:
    """Parse a LlavaConfig (`llava`) or LlavaNextConfig (`llava_next`)."""
    reader = KeyReader(raw, "config.json", _IGNORED)
    is_next = reader.text("model_type") == "llava_next"
    text_reader = reader.child("text_config")
    family = family_named(text_reader.text("model_type", "llama"))
    text_reader.ignored = family.ignored
    tied = _is_tied(reader, text_reader, family, weight_names, is_next=is_next)
    text = _as_in_llava(family.parse(text_reader, tied=tied), reader)
    vision = _vision(reader)
    projector = ProjectorConfig(
        kind="mlp",
        vision_size=vision.hidden_size,
        hidden_size=text.hidden_size,
        depth=2,
        activation=parse_activation(reader, "projector_hidden_act", "gelu"),
        bias=reader.flag("multimodal_projector_bias", True),
    )
    image, image_report = _image(reader, preprocessor, vision, is_next=is_next)
    ids = [reader.optional_integer(key) for key in ("image_token_index", "image_token_id")]
    image_id = next((one for one in ids if one is not None), 32000)
    tokens, token_report = parse_tokens(text_reader, generation, image_id=image_id)
    config = ModelConfig(
        text=text,
        tokens=tokens,
        vision=vision,
        projector=projector,
        image=image,
        vision_in_checkpoint=True,
        has_newline=is_next,
        modalities=parse_modalities(reader),
        layout="hf_llava_next" if is_next else "hf_llava",
        torch_dtype=parse_dtype((reader, text_reader)),
        context_length=text.max_positions,
        padding_side="left",
        template=reader.text(RECORD_KEY),
    )
    return config, reader.report() + token_report + image_report


def _is_tied(
    reader: KeyReader,
    text_reader: KeyReader,
    family: Family,
    weight_names: frozenset[str],
    *,
    is_next: bool,
) -> bool:
    """Return whether the output layer is the embedding.

    Note:
        LlavaConfig takes the answer of either level, LlavaNextConfig only its own. Files of older
        releases say it in text_config alone and then have no output layer, which decides.
    """
    outer = reader.flag("tie_word_embeddings", False)
    inner = family.is_tied(text_reader)
    has_head = any(name.endswith("lm_head.weight") for name in weight_names)
    if outer or (inner and not is_next):
        return True
    return inner and not has_head


def _as_in_llava(text: TextConfig, reader: KeyReader) -> TextConfig:
    """Return the language model as transformers' LLaVA classes run it: they cap no logits.

    What was trained with a cap and saved here says so under a key of lapilli's own, so that it is
    sampled from as it was.
    """
    cap = reader.optional_number(CAP_KEY, least=1e-3, most=1e6)
    return replace(text, logit_softcap=cap) if isinstance(text, DecoderConfig) else text


def _vision(reader: KeyReader) -> VisionConfig:
    layer = reader.value("vision_feature_layer")
    if isinstance(layer, list):
        if len(layer) != 1:
            raise UnsupportedModelError(
                f"config.json: vision_feature_layer {shown(layer)} takes {len(layer)} layers, "
                "only one is supported"
            )
        layer = layer[0]
    if layer is None:
        layer = -2
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ConfigError(f"config.json: vision_feature_layer must be a number, got {shown(layer)}")
    select = reader.choice("vision_feature_select_strategy", "default", STRATEGIES)
    section = reader.child("vision_config", TOWER_IGNORED)
    if not section.raw:
        section = KeyReader(LARGE_CLIP, "config.json")
    vision = parse_tower(section, feature_layer=layer, feature_select=select)
    if vision.family == "clip" and select == "drop_first":
        return replace(vision, feature_select="patch")
    return vision


def _image(
    reader: KeyReader, preprocessor: JsonObject | None, vision: VisionConfig, *, is_next: bool
) -> tuple[ImageConfig, KeyReport]:
    """Read preprocessing from the checkpoint's file, the layout of features from config.json."""
    pixels, steps = parse_pixels(preprocessor, vision)
    pads = steps.flag("do_pad", False)
    report = steps.report()
    # The layout names no image mode: its model_type says it, and do_pad of the preprocessor.
    if not is_next:
        return ImageConfig(pixels=pixels, aspect="pad" if pads else "square"), report
    if not reader.flag("use_image_newline_parameter", True):
        raise UnsupportedModelError(
            "config.json: use_image_newline_parameter false is not supported, expected true"
        )
    found = reader.value("image_grid_pinpoints")
    pinpoints = parse_pinpoints(DEFAULT_PINPOINTS if found is None else found, width_first=False)
    image = ImageConfig(
        pixels=pixels,
        aspect="anyres",
        merge="spatial_unpad",
        pinpoints=pinpoints,
        rounds_unpad=True,
    )
    return image, report


def _parse_language_model(
    raw: JsonObject, generation: JsonObject | None
) -> tuple[ModelConfig, KeyReport]:
    """Parse a language model without images."""
    family = family_named(raw.get("model_type"))
    reader = KeyReader(raw, "config.json", family.ignored)
    text = family.parse(reader)
    tokens, token_report = parse_tokens(reader, generation)
    config = ModelConfig(
        text=text,
        tokens=tokens,
        modalities=parse_modalities(reader),
        layout="text",
        torch_dtype=parse_dtype((reader,)),
        context_length=text.max_positions,
        template=reader.text(RECORD_KEY),
    )
    return config, reader.report() + token_report
