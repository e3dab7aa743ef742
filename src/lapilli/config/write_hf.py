"""ModelConfig -> config.json and processor files of Hugging Face's LLaVA: the way back of hf.py."""

from lapilli.config.families import find_family
from lapilli.config.families.decoder import ACTIVATION_NAMES
from lapilli.config.llava import CAP_KEY, RECORD_KEY
from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.config.projector import projector_name
from lapilli.config.write import (
    write_preprocessor_config,
    write_text_config,
    write_tower_config,
)
from lapilli.errors import UnsupportedModelError

IMAGE_TOKEN = "<image>"  # noqa: S105  no password


def refuse_unsayable(config: ModelConfig) -> None:
    """Refuse a model that LlavaForConditionalGeneration and its successor cannot be.

    Raises:
        UnsupportedModelError: another language model, projector or layout of the features.
    """
    lack = _what_is_unsayable(config)
    if lack is not None:
        raise UnsupportedModelError(
            f"the layout of Hugging Face has no {lack}: keep the original's (save.layout = "
            '"llava" in a recipe, --layout llava in lapilli export)'
        )


def _what_is_unsayable(config: ModelConfig) -> str | None:
    """Return the first thing that the layout has no words for."""
    vision, projector, image = _parts(config)
    family = find_family(config.text.family)
    if family is None or not family.in_hf_llava:
        return f"{config.text.family} language model"
    if config.tokens.use_start_end:
        return "<im_start> and <im_end> around a picture"
    if projector.kind != "mlp" or projector.depth != 2 or projector.joins:
        return f"projector {projector_name(projector)!r}, only 'mlp2x_gelu'"
    is_flat = image.aspect != "anyres" and image.merge == "flat"
    if not is_flat and not _is_next(image):
        return (
            f"image_aspect_ratio {image.aspect!r} with mm_patch_merge_type {image.merge!r}, only "
            "square or pad with flat, and anyres with spatial_unpad"
        )
    if _is_next(image) and vision.num_patches != vision.grid.rows * vision.grid.columns:
        return f"anyres with {vision.feature_select!r} features"
    return None


def write_hf_config(
    config: ModelConfig, *, image_id: int, torch_dtype: str, template: str | None = None
) -> dict[str, object]:
    """config.json of LlavaConfig or LlavaNextConfig.

    Args:
        config: what the model is, its vocabulary with the image token.
        image_id: the vocabulary entry that stands for every position of a picture.
        torch_dtype: of the stored weights.
        template: name of its conversation template, or "chat_template" for the one beside it.

    Raises:
        UnsupportedModelError: see `refuse_unsayable`.
    """
    refuse_unsayable(config)
    vision, projector, image = _parts(config)
    is_next = _is_next(image)
    eos = list(config.tokens.eos_ids)
    ids = {
        "bos_token_id": config.tokens.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.tokens.pad_id,
    }
    tower = write_tower_config(vision, torch_dtype)
    if vision.family == "siglip":
        tower |= {"vision_use_head": False}
    name = "LlavaNext" if is_next else "Llava"
    written: dict[str, object] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_next" if is_next else "llava",
        "text_config": {
            "model_type": config.text.family,
            **write_text_config(config.text),
            **ids,
            "torch_dtype": torch_dtype,
        },
        "vision_config": tower,
        "image_token_index": image_id,
        "image_seq_length": vision.num_patches,
        "projector_hidden_act": ACTIVATION_NAMES[projector.activation],
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": _strategy(vision),
        "tie_word_embeddings": config.text.tie_embeddings,
        **ids,
        "torch_dtype": torch_dtype,
    }
    if is_next:
        written["image_grid_pinpoints"] = _pinpoints(image)
        written["use_image_newline_parameter"] = True
    if isinstance(config.text, DecoderConfig) and config.text.logit_softcap is not None:
        written[CAP_KEY] = config.text.logit_softcap  # transformers' LLaVA classes cap no logits
    if template is not None:
        written[RECORD_KEY] = template
    return written


def write_hf_preprocessor(config: ModelConfig) -> dict[str, object]:
    """preprocessor_config.json beside such a config.json."""
    vision, _, image = _parts(config)
    written = write_preprocessor_config(image.pixels)
    written["processor_class"] = processor_class(config)
    if _is_next(image):
        return written | {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": _pinpoints(image),
            "do_pad": True,
        }
    if image.aspect == "pad":
        return written | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    is_siglip = vision.family == "siglip"
    return written | {
        "image_processor_type": "SiglipImageProcessor" if is_siglip else "CLIPImageProcessor"
    }


def write_hf_processor(config: ModelConfig, image_token: str = IMAGE_TOKEN) -> dict[str, object]:
    """processor_config.json: how many image tokens the processor writes for a picture."""
    vision, _, _ = _parts(config)
    extra = int(vision.family == "clip")
    return {
        "processor_class": processor_class(config),
        "image_token": image_token,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": extra,
        "vision_feature_select_strategy": _strategy(vision),
    }


def processor_class(config: ModelConfig) -> str:
    """Return the class of transformers that prepares text and pictures."""
    _, _, image = _parts(config)
    return "LlavaNextProcessor" if _is_next(image) else "LlavaProcessor"


def _parts(config: ModelConfig) -> tuple[VisionConfig, ProjectorConfig, ImageConfig]:
    if config.vision is None or config.projector is None or config.image is None:
        raise UnsupportedModelError(
            "a model without pictures has no LLaVA layout: it is a plain language model"
        )
    return config.vision, config.projector, config.image


def _is_next(image: ImageConfig) -> bool:
    return image.aspect == "anyres" and image.merge == "spatial_unpad"


def _strategy(vision: VisionConfig) -> str:
    """`default` drops the first feature, whatever it is; a SigLIP tower has no class token."""
    if vision.feature_select == "drop_first":
        return "default"
    return "default" if vision.family == "clip" and vision.feature_select == "patch" else "full"


def _pinpoints(image: ImageConfig) -> list[list[int]]:
    return [[size.height, size.width] for size in image.pinpoints]
