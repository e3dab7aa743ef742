"""Writer of Hugging Face's layout: LlavaForConditionalGeneration, or LlavaNext for anyres.

    config.json  generation_config.json  model.safetensors or shards with index
    tokenizer.json  tokenizer_config.json  preprocessor_config.json  processor_config.json
    chat_template.jinja

One token is the placeholder of every position of a picture; it is added if there is none. A
language model without pictures, but with declared modalities, is written as the plain model that it
is to transformers.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lapilli.checkpoint.formats.quantized import KEY
from lapilli.checkpoint.keymaps import HF_LLAVA, LANGUAGE_MODEL
from lapilli.checkpoint.read.assemble import VOCABULARY, resized
from lapilli.checkpoint.template import WrittenTemplate, written_template
from lapilli.checkpoint.tokenizer import (
    load_tokenizer,
    save_tokenizer_with,
    settle_generation,
    special_ids,
    write_beside,
    write_chat_template,
    write_extra,
)
from lapilli.checkpoint.write.adapter import merged_state
from lapilli.checkpoint.write.files import (
    SHARD_BYTES,
    Check,
    Deferred,
    Formats,
    Stored,
    common_dtypes,
    dtype_name,
    new_directory,
    value,
    write_json,
    write_weights,
)
from lapilli.checkpoint.write.llava import (
    HALF,
    check_declared,
    write_preprocessor_config,
    write_tower_config,
)
from lapilli.config.families import family_of, find_family
from lapilli.config.families.decoder import ACTIVATION_NAMES
from lapilli.config.llava import CAP_KEY, RECORD_KEY
from lapilli.config.modalities import write_modalities
from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.config.projector import projector_name
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.modality.image.modes import mode_named, mode_names, mode_of
from lapilli.model import VisionLanguageModel
from lapilli.prompt.choose import Template
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.quant.linear import QuantLinear

IMAGE_TOKEN = "<image>"  # noqa: S105  no password
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext"}  # how classes of a model_type begin


def save_hf(
    path: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    *,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    dtype: Formats = None,
    template: str | Template | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    state: Mapping[str, Stored] | None = None,
    section: Mapping[str, object] | None = None,
    extra: Mapping[str, str | bytes] | None = None,
    check: Check | None = None,
) -> None:
    """Save a whole checkpoint that transformers and lapilli read; adapters are merged.

    The arguments are those of `save_llava`; `tokenizer` is the model's, and `tokenizer_path` its
    directory.

    Raises:
        CheckpointError: the directory is there already, or the disk is full.
        ConfigError: the model is quantized, and no `section` says how `state` holds that.
        UnsupportedModelError: see `check_hf_layout`.

    Note: new rows of the image token in both vocabulary tables are the mean of the others.
    """
    check_hf_layout(config)
    if section is None and any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError("the model is quantized: save it from one that is not")
    written = written_template(template, config, tokenizer_path)
    whole = merged_state(model) if state is None else state
    check_declared(whole, config)
    if config.vision is None:
        with new_directory(path, overwrite=overwrite, check=check) as folder:
            write_weights(folder, whole, LANGUAGE_MODEL, dtype=dtype, shard_bytes=shard_bytes)
            stored = HALF if section else dtype_name(common_dtypes(whole, dtype)[0])
            content = write_text_config(config, torch_dtype=stored, template=written.name)
            write_json(folder / "config.json", content | ({KEY: section} if section else {}))
            write_beside(folder, tokenizer_path, extra, jinja=written.jinja, tokens=config.tokens)
        return
    with new_directory(path, overwrite=overwrite, check=check) as folder:
        image_id = _write_processor(folder, config, tokenizer, tokenizer_path, written)
        rows = max(config.text.vocab_size, image_id + 1)
        tensors = {name: _with_rows(name, tensor, rows) for name, tensor in whole.items()}
        write_weights(folder, tensors, HF_LLAVA, dtype=dtype, shard_bytes=shard_bytes)
        content = write_hf_config(
            replace(config, text=replace(config.text, vocab_size=rows)),
            image_id=image_id,
            torch_dtype=HALF if section else dtype_name(common_dtypes(whole, dtype)[0]),
            template=written.name,
        )
        if section is not None:
            content |= {KEY: section}
        write_json(folder / "config.json", content)
        generation = folder / "generation_config.json"
        if generation.is_file():  # the tokenizer's directory had one
            settle_generation(folder, config.tokens)
        else:
            write_json(generation, {"_from_model_config": True, **special_ids(config.tokens)})
        write_json(folder / "preprocessor_config.json", write_hf_preprocessor(config))
        write_extra(folder, extra)


def check_hf_files(
    config: ModelConfig,
    *,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    template: str | Template | None,
) -> None:
    """Check before a run what `save_hf` would refuse after it; the arguments are the same.

    Raises:
        CheckpointError: the tokenizer cannot be written as a tokenizer.json.
        ConfigError: the template cannot be written.
        PromptError: the template is one for captions.
        UnsupportedModelError: see `check_hf_layout`.
    """
    check_hf_layout(config)
    written = written_template(template, config, tokenizer_path)
    if config.vision is None:
        return
    with tempfile.TemporaryDirectory(prefix="lapilli-processor-") as folder:
        _write_processor(Path(folder), config, tokenizer, tokenizer_path, written)


def _write_processor(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    template: WrittenTemplate,
) -> int:
    """Write the files of tokenizer, processor and template; return the id of the image token."""
    own = config.tokens.image_id
    token = IMAGE_TOKEN if own is None else tokenizer.id_to_token(own)
    image_id = save_tokenizer_with(
        folder, tokenizer_path, tokenizer, token, processor=processor_class(config)
    )
    write_json(folder / "processor_config.json", write_hf_processor(config, token))
    source = template.for_whole_prompts(
        load_tokenizer(folder, fast=True), image_id, was_whole=own is not None
    )
    write_chat_template(folder, source)
    return image_id


def _with_rows(name: str, tensor: Stored, rows: int) -> Stored:
    if name not in VOCABULARY or tensor.shape[0] == rows:
        return tensor
    shape = torch.Size((rows, *tensor.shape[1:]))
    return Deferred(shape, tensor.dtype, lambda: resized(value(tensor), rows))


def check_hf_layout(config: ModelConfig) -> None:
    """Check that the layout of Hugging Face can hold a model.

    Raises:
        UnsupportedModelError: it has no such language model, projector or layout of the features.
    """
    lack = _lacks(config)
    if lack is not None:
        raise UnsupportedModelError(
            f"the layout of Hugging Face has no {lack}: keep the original's (save.layout = "
            '"llava" in a recipe, --layout llava in lapilli export)'
        )


def _lacks(config: ModelConfig) -> str | None:
    """Return the first property of a model that the layout does not have."""
    family = find_family(config.text.family)
    if config.vision is None:
        return None if family is not None else f"{config.text.family} language model"
    vision, projector, image = _parts(config)
    if family is None or not family.in_hf_llava:
        return f"{config.text.family} language model"
    if config.tokens.use_start_end:
        return "<im_start> and <im_end> around a picture"
    if projector.kind != "mlp" or projector.depth != 2 or projector.joins:
        return f"projector {projector_name(projector)!r}, only 'mlp2x_gelu'"
    mode = mode_of(image)
    if image.merge not in mode.hf_types:
        known = [
            f"{name} with {merge}" for name in mode_names() for merge in mode_named(name).hf_types
        ]
        return (
            f"image_aspect_ratio {image.aspect!r} with mm_patch_merge_type {image.merge!r}, only "
            f"{', '.join(known)}"
        )
    if mode.is_tiled and vision.num_patches != vision.grid.rows * vision.grid.columns:
        return f"{image.aspect} with {vision.feature_select!r} features"
    return None


def write_text_config(
    config: ModelConfig, *, torch_dtype: str, template: str | None = None
) -> dict[str, object]:
    """Return config.json of a plain language model, with the modalities that it declares.

    `template` is a `WrittenTemplate.name`.
    """
    family = family_of(config.text)
    written: dict[str, object] = {
        "architectures": [family.original[1].removeprefix("Llava")],
        "model_type": family.model_type,
        **family.write(config.text),
        **special_ids(config.tokens),
        "torch_dtype": torch_dtype,
        **write_modalities(config.modalities),
    }
    return written if template is None else {**written, RECORD_KEY: template}


def write_hf_config(
    config: ModelConfig, *, image_id: int, torch_dtype: str, template: str | None = None
) -> dict[str, object]:
    """Return config.json of LlavaConfig or LlavaNextConfig.

    The vocabulary of `config` has the image token, `image_id`; `template` is a
    `WrittenTemplate.name`.

    Raises:
        UnsupportedModelError: see `check_hf_layout`.
    """
    check_hf_layout(config)
    vision, projector, image = _parts(config)
    ids = special_ids(config.tokens)
    tower = write_tower_config(vision, torch_dtype)
    if vision.family == "siglip":
        tower |= {"vision_use_head": False}
    written: dict[str, object] = {
        "architectures": [f"{CLASSES[_hf_type(image)]}ForConditionalGeneration"],
        "model_type": _hf_type(image),
        "text_config": {
            "model_type": config.text.family,
            **family_of(config.text).write(config.text),
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
    written |= mode_of(image).hf_keys(image)
    if isinstance(config.text, DecoderConfig) and config.text.logit_softcap is not None:
        written[CAP_KEY] = config.text.logit_softcap  # transformers' LLaVA classes cap no logits
    written |= write_modalities(config.modalities)
    if template is not None:
        written[RECORD_KEY] = template
    return written


def write_hf_preprocessor(config: ModelConfig) -> dict[str, object]:
    """Return preprocessor_config.json beside such a config.json."""
    vision, _, image = _parts(config)
    written = write_preprocessor_config(image.pixels)
    written["processor_class"] = processor_class(config)
    is_siglip = vision.family == "siglip"
    written["image_processor_type"] = "SiglipImageProcessor" if is_siglip else "CLIPImageProcessor"
    return written | mode_of(image).hf_preprocessor(image)


def write_hf_processor(config: ModelConfig, image_token: str = IMAGE_TOKEN) -> dict[str, object]:
    """Return processor_config.json, which gives the number of image tokens of a picture."""
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
    return f"{CLASSES[_hf_type(image)]}Processor"


def _parts(config: ModelConfig) -> tuple[VisionConfig, ProjectorConfig, ImageConfig]:
    if config.vision is None or config.projector is None or config.image is None:
        raise UnsupportedModelError(
            "a model without pictures has no LLaVA layout: it is a plain language model"
        )
    return config.vision, config.projector, config.image


def _hf_type(image: ImageConfig) -> str:
    """Return the model_type that sees pictures in this way."""
    return mode_of(image).hf_types[image.merge]


def _strategy(vision: VisionConfig) -> str:
    """Return `default`, which drops the first feature whatever it is, or `full`.

    A SigLIP tower has no class token to drop.
    """
    if vision.feature_select == "drop_first":
        return "default"
    return "default" if vision.family == "clip" and vision.feature_select == "patch" else "full"
