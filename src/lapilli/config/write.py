"""ModelConfig -> config.json of the original LLaVA: the way back of llava.py."""

from dataclasses import replace

from lapilli.config.families import family_of, find_family, text_types
from lapilli.config.families.decoder import ACTIVATION_NAMES
from lapilli.config.llava import IMAGE_KEY, RECORD_KEY, ROUNDS_KEY
from lapilli.config.model import (
    ImageConfig,
    ModelConfig,
    PixelConfig,
    TextConfig,
    VisionConfig,
)
from lapilli.config.projector import projector_name
from lapilli.errors import UnsupportedModelError


def write_llava_config(
    config: ModelConfig,
    *,
    vision_source: str | None,
    torch_dtype: str,
    template: str | None = None,
) -> dict[str, object]:
    """config.json of a checkpoint in the original layout.

    Args:
        config: what the model is.
        vision_source: what mm_vision_tower says: a directory (relative to the checkpoint where it
            lies in it) or a hub id.
        torch_dtype: of the stored weights, such as "float16".
        template: name of its conversation template, or "chat_template" for the one beside it.

    Raises:
        UnsupportedModelError: a language model or projector that the original layout cannot say.
    """
    text = config.text
    family = find_family(text.family)
    if family is None:
        raise UnsupportedModelError(
            f"the original layout has no {text.family} language model, "
            f"only {', '.join(text_types())}"
        )
    model_type, architecture = family.original
    written: dict[str, object] = {
        "architectures": [architecture],
        "model_type": model_type,
        **write_text_config(text),
        "torch_dtype": torch_dtype,
        "use_cache": True,
        **_tokens(config),
        "tokenizer_padding_side": config.padding_side,
        "tokenizer_model_max_length": config.max_length,
        "max_sequence_length": config.context_length,
    }
    if config.vision and config.projector and config.image:
        written |= _vision(config, config.vision, vision_source)
        written["mm_projector_type"] = projector_name(config.projector)
        written |= _image(config.image)
    if template is not None:
        written[RECORD_KEY] = template
    if config.tokens.image_id is not None:
        written[IMAGE_KEY] = config.tokens.image_id
    return written


def refuse_unsayable(config: ModelConfig) -> None:
    """Refuse a model that the original layout cannot be.

    Raises:
        UnsupportedModelError: see `write_llava_config`.
    """
    write_llava_config(as_original(config), vision_source=None, torch_dtype="float32")


def as_original(config: ModelConfig) -> ModelConfig:
    """Return the same model as the original layout says it.

    How Hugging Face tokenizes a prompt and rounds the size of an unpadded picture goes along under
    keys of lapilli's own, so that the model answers here as it did. The original's programs do not
    know them: they tokenize the text between pictures, and a very long picture can differ there by
    a row of features.
    """
    if config.layout == "llava":
        return config
    tokens = replace(config.tokens, use_patch_token=False)
    return replace(config, layout="llava", tokens=tokens)


def write_text_config(text: TextConfig) -> dict[str, object]:
    """Return the language model's keys, flat in the original layout and a section in others."""
    return family_of(text).write(text)


def _tokens(config: ModelConfig) -> dict[str, object]:
    tokens = config.tokens
    eos: int | list[int] | None = list(tokens.eos_ids)
    if len(tokens.eos_ids) < 2:
        eos = tokens.eos_ids[0] if tokens.eos_ids else None
    return {
        "bos_token_id": tokens.bos_id,
        "eos_token_id": eos,
        "pad_token_id": tokens.pad_id,
        "mm_use_im_start_end": tokens.use_start_end,
        "mm_use_im_patch_token": tokens.use_patch_token,
    }


def _vision(
    config: ModelConfig, vision: VisionConfig, vision_source: str | None
) -> dict[str, object]:
    if vision.feature_select == "drop_first":
        raise UnsupportedModelError(
            "the original layout cannot leave out the first patch, as Hugging Face does with SigLIP"
        )
    return {
        "mm_vision_tower": vision_source or config.vision_source,
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": vision.feature_layer,
        "mm_vision_select_feature": vision.feature_select,
        "unfreeze_mm_vision_tower": config.vision_in_checkpoint,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
    }


def _image(image: ImageConfig) -> dict[str, object]:
    written: dict[str, object] = {
        "image_aspect_ratio": image.aspect,
        "mm_patch_merge_type": image.merge,
    }
    if image.pinpoints:
        written["image_grid_pinpoints"] = [[size.width, size.height] for size in image.pinpoints]
    if image.rounds_unpad:
        written[ROUNDS_KEY] = True
    return written


def write_tower_config(vision: VisionConfig, torch_dtype: str) -> dict[str, object]:
    """config.json of a vision tower in a directory of its own."""
    is_clip = vision.family == "clip"
    return {
        "architectures": ["CLIPVisionModel" if is_clip else "SiglipVisionModel"],
        "model_type": f"{vision.family}_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "hidden_act": ACTIVATION_NAMES[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "torch_dtype": torch_dtype,
    }


def write_preprocessor_config(pixels: PixelConfig) -> dict[str, object]:
    """preprocessor_config.json of a vision tower."""
    size: dict[str, int] = {"shortest_edge": pixels.shortest_edge or pixels.crop_size.height}
    if pixels.resize_to is not None:
        size = pixels.resize_to._asdict()
    squeezes = pixels.resize_to is not None and not pixels.do_center_crop
    return {
        "image_processor_type": "SiglipImageProcessor" if squeezes else "CLIPImageProcessor",
        "size": size,
        "crop_size": pixels.crop_size._asdict(),
        "do_convert_rgb": True,
        "do_resize": pixels.do_resize,
        "do_center_crop": pixels.do_center_crop,
        "do_rescale": pixels.do_rescale,
        "rescale_factor": pixels.rescale_factor,
        "do_normalize": pixels.do_normalize,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": pixels.resample,
    }
