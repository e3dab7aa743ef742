"""Writer of the original LLaVA layout: whole models, projectors, and config.json of adapters.

config.json  model.safetensors or shards with index  tokenizer files  generation_config.json
vision_tower/{config.json, preprocessor_config.json, model.safetensors}   with tower="beside"
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from lapilli.checkpoint.formats.quantized import KEY, check_quantization, written_quantization
from lapilli.checkpoint.keymaps import (
    TOWER,
    VISION_TOWER,
    is_declared,
    is_joint,
    original_keymap,
)
from lapilli.checkpoint.template import written_template
from lapilli.checkpoint.tokenizer import special_ids, write_beside
from lapilli.checkpoint.write.files import (
    SHARD_BYTES,
    TOWER_FOLDER,
    Check,
    Formats,
    Stored,
    common_dtypes,
    dtype_name,
    new_directory,
    write_json,
    write_pickled,
    write_weights,
)
from lapilli.config.families import find_family, text_types
from lapilli.config.families.decoder import ACTIVATION_NAMES
from lapilli.config.llava import IMAGE_KEY, RECORD_KEY, ROUNDS_KEY
from lapilli.config.modalities import write_modalities
from lapilli.config.model import (
    ImageConfig,
    ModelConfig,
    PixelConfig,
    VisionConfig,
)
from lapilli.config.projector import projector_name
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.lora import adapters
from lapilli.model import VisionLanguageModel
from lapilli.prompt.choose import Template
from lapilli.quant import QuantConfig
from lapilli.quant.linear import QuantLinear

TowerPlace = Literal["named", "inside", "beside"]
HALF = "float16"  # the dtype of a checkpoint that is packed for other libraries


def save_llava(
    path: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    *,
    tokenizer_path: Path | None = None,
    tower: TowerPlace | None = None,
    dtype: Formats = None,
    template: str | Template | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    quantization: QuantConfig | None = None,
    state: Mapping[str, Stored] | None = None,
    section: Mapping[str, object] | None = None,
    extra: Mapping[str, str | bytes] | None = None,
    check: Check | None = None,
) -> None:
    """Save a whole checkpoint that lapilli and the original read.

    Args:
        path: the new directory. The original goes by its name, so it should contain "llava", and
            "mistral" or "mpt" for those language models.
        model: without unmerged adapters.
        config: of the model, in any layout.
        tokenizer_path: a directory whose tokenizer files are copied.
        tower: "named": only named, by `config.vision_source`; "inside": among the other weights,
            as a tuned tower; "beside": in a folder of its own. None: inside if it was tuned, named
            if its source is a hub id or an absolute path, else beside.
        dtype: of the stored weights, or of each by the name of its parameter (such as
            `Loaded.stored`, the dtypes of its files); None: as they are.
        template: the conversation template of the model, or its name; None: see `written_template`.
        overwrite: replace a directory that is there.
        shard_bytes: largest size of one weight file.
        quantization: of a quantized model. Only lapilli reads such a checkpoint; a packed tower is
            inside of it, a tuned float one beside.
        state: other tensors under the names of `model.state_dict()`, for instance `merged_state`.
        section: the quantization_config of packed layers that `state` has in the format of another
            library, whose programs compute in float16.
        extra: more files by name, such as README.md.
        check: see `new_directory`.

    Raises:
        CheckpointError: the directory is there already, or the disk is full.
        ConfigError: an adapter is not merged, a tower has no name, or packed layers and
            `quantization` do not go together.
        UnsupportedModelError: the original layout cannot hold the model.
    """
    if state is None and any(True for _ in adapters(model)):
        raise ConfigError("the model has an unmerged adapter: lapilli.lora.merge(model) first")
    if section is None:
        check_quantization(model, quantization, dtype if isinstance(dtype, torch.dtype) else None)
    written = written_template(template, config, tokenizer_path)
    config = as_original(config)
    keymap = original_keymap(config.text)
    place: TowerPlace = tower or ("named" if is_lasting(config.vision_source) else "beside")
    if tower is None and config.vision_in_checkpoint:
        place = "inside"
    if quantization is not None and quantization.quantize_tower:
        place = "inside"
    elif (quantization or section) and place == "inside":
        place = "beside"  # stored once: inside, the original wants it beside as well
    state = model.state_dict() if state is None else state
    check_declared(state, config)
    tower_state = {name: state[name] for name in state if name.startswith(TOWER)}
    inner = {n: t for n, t in state.items() if place == "inside" or n not in tower_state}
    with new_directory(path, overwrite=overwrite, check=check) as folder:
        write_weights(folder, inner, keymap, dtype=dtype, shard_bytes=shard_bytes)
        content = write_llava_config(
            replace(config, vision_in_checkpoint=place == "inside"),
            vision_source=_tower_name(config, place),
            torch_dtype=HALF if section else dtype_name(common_dtypes(inner, dtype)[0]),
            template=written.name,
        )
        if quantization is not None:
            section = written_quantization(quantization)
        if section is not None:
            content |= {KEY: section}
        write_json(folder / "config.json", content)
        if tower_state and content.get("mm_vision_tower") == TOWER_FOLDER:
            is_packed = quantization is not None and quantization.quantize_tower
            _write_tower(folder / TOWER_FOLDER, config, {} if is_packed else tower_state, dtype)
        write_beside(folder, tokenizer_path, extra, jinja=written.jinja, tokens=config.tokens)


def save_projector(
    path: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    *,
    base: str | None = None,
    tokenizer_path: Path | None = None,
    template: str | Template | None = None,
    overwrite: bool = False,
    state: Mapping[str, Stored] | None = None,
    extra: Mapping[str, str | bytes] | None = None,
) -> None:
    """Save a projector-only checkpoint, config.json and mm_projector.bin, as the original does.

    Declared modalities are among its tensors, with their encoders.

    The arguments are those of `save_llava`; `base`, the language model, is written as
    `_name_or_path`.

    Raises:
        CheckpointError: the directory is there already, or the disk is full.
        ConfigError: the tower has no name, or the projector is quantized.
    """
    if any(isinstance(module, QuantLinear) for module in model.modalities.modules()):
        raise ConfigError("the projector is quantized: save it from a model whose projector is not")
    written = written_template(template, config, tokenizer_path)
    config = as_original(config)
    whole = model.state_dict() if state is None else state
    check_declared(whole, config)
    projector = {name: tensor for name, tensor in whole.items() if is_joint(name)}
    named = {} if base is None else {"_name_or_path": base}
    with new_directory(path, overwrite=overwrite) as folder:
        write_pickled(folder / "mm_projector.bin", original_keymap(config.text).rename(projector))
        content = config_of_part(folder, model, config, written.name)
        write_json(folder / "config.json", {**named, **content, "tune_mm_mlp_adapter": True})
        write_beside(folder, tokenizer_path, extra, jinja=written.jinja, tokens=config.tokens)


def config_of_part(
    folder: Path, model: VisionLanguageModel, config: ModelConfig, template: str | None
) -> dict[str, object]:
    """Return config.json of an adapter or a projector on another checkpoint.

    Its dtype is the one of the files below, not the one of the computation. For a tower among the
    weights below its two config files are written into `folder`, because the original layout has
    no other place for them.

    Raises:
        ConfigError: a tower outside the weights below has no name.
    """
    if config.vision_in_checkpoint and not config.vision_source:
        _write_tower(folder / TOWER_FOLDER, config, {})
        source: str | None = TOWER_FOLDER
    else:
        source = _tower_name(config, "named")
    return write_llava_config(
        config,
        vision_source=source,
        torch_dtype=config.torch_dtype or dtype_name(next(iter(model.parameters())).dtype),
        template=template,
    )


def check_declared(names: Iterable[str], config: ModelConfig) -> None:
    """Check that the configuration declares every modality that has parameters.

    Raises:
        ConfigError: one was only put into the model; nobody could load its tensors.
    """
    owners = {name.split(".", 2)[1] for name in names if is_declared(name)}
    lost = sorted(owners - {name for name, _ in config.modalities})
    if lost:
        raise ConfigError(
            f"the configuration does not declare the modality {lost[0]!r} that the model has: make "
            "it with lapilli.train.build.add_modalities, or add it to ModelConfig.modalities"
        )


def is_lasting(source: str | None) -> bool:
    """Return whether the name of a tower stays valid when the checkpoint is moved."""
    if source is None or source.startswith("."):
        return False
    return "/" in source or Path(source).is_absolute()


def _tower_name(config: ModelConfig, place: TowerPlace) -> str | None:
    """Return the value of mm_vision_tower.

    The original builds even a tuned tower from it, so it names a whole directory.
    """
    if config.vision is None:
        return None
    if place == "beside" or (place == "inside" and not is_lasting(config.vision_source)):
        return TOWER_FOLDER
    if not config.vision_source:
        raise ConfigError("the vision tower has no name: save it inside or beside the checkpoint")
    return config.vision_source


def _write_tower(
    folder: Path, config: ModelConfig, state: Mapping[str, Stored], dtype: Formats = None
) -> None:
    """Write the tower's own directory, without weights if `state` is empty."""
    if config.vision is None or config.image is None:
        return
    folder.mkdir()
    stored = config.torch_dtype or "float32"
    if state:
        write_weights(folder, state, VISION_TOWER, dtype=dtype)
        stored = dtype_name(common_dtypes(state, dtype)[0])
    write_json(folder / "config.json", write_tower_config(config.vision, stored))
    write_json(folder / "preprocessor_config.json", write_preprocessor_config(config.image.pixels))


def write_llava_config(
    config: ModelConfig,
    *,
    vision_source: str | None,
    torch_dtype: str,
    template: str | None = None,
) -> dict[str, object]:
    """Return config.json of a checkpoint in the original layout.

    `vision_source` is a hub id or a directory, relative to the checkpoint if it is inside;
    `template` is a `WrittenTemplate.name`.

    Raises:
        UnsupportedModelError: the original layout has no such language model or projector.
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
        **family.write(text),
        "torch_dtype": torch_dtype,
        "use_cache": True,
        **special_ids(config.tokens),
        "mm_use_im_start_end": config.tokens.use_start_end,
        "mm_use_im_patch_token": config.tokens.use_patch_token,
        "tokenizer_padding_side": config.padding_side,
        "tokenizer_model_max_length": config.max_length,
        "max_sequence_length": config.context_length,
    }
    if config.vision and config.projector and config.image:
        written |= _vision(config, config.vision, vision_source)
        written["mm_projector_type"] = projector_name(config.projector)
        written |= _image(config.image)
    written |= write_modalities(config.modalities)
    if template is not None:
        written[RECORD_KEY] = template
    if config.tokens.image_id is not None:
        written[IMAGE_KEY] = config.tokens.image_id
    return written


def check_llava_layout(config: ModelConfig) -> None:
    """Check that the original layout can hold a model.

    Raises:
        UnsupportedModelError: see `write_llava_config`.
    """
    write_llava_config(as_original(config), vision_source=None, torch_dtype="float32")


def as_original(config: ModelConfig) -> ModelConfig:
    """Return the configuration of the same model in the original layout.

    Hugging Face's tokenization of a prompt and its rounding of unpadded pictures are kept under
    keys of lapilli's own, so that the model answers as before. The original's programs do not know
    them: they tokenize the text between pictures, and a very long picture can differ by a row of
    features.
    """
    if config.layout == "llava":
        return config
    tokens = replace(config.tokens, use_patch_token=False)
    return replace(config, layout="llava", tokens=tokens)


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
    """Return config.json of a vision tower in a directory of its own."""
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
    """Return preprocessor_config.json of a vision tower."""
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
