"""load_pretrained_model of the original (llava.model.builder) over our own reading of files."""

# The types of transformers differ from release to release, and no release has all of them.
# mypy: allow-untyped-calls

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from lapilli.checkpoint.keymaps import LANGUAGE_MODEL, TEXT, TOWER, VISION_TOWER
from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.checkpoint.source import find_directory, read_optional_json
from lapilli.checkpoint.tokenizer import add_image_tokens, load_tokenizer
from lapilli.checkpoint.write.llava import as_original, write_llava_config
from lapilli.compat import models, present
from lapilli.compat.mm_utils import Foreign
from lapilli.compat.tokenizer import PreTrainedTokenizer, wrap_tokenizer
from lapilli.compat.tower import CLIPImageProcessor, CLIPVisionTower, filled, vision_config
from lapilli.errors import UnsupportedModelError
from lapilli.lm.foreign import ForeignLanguageModel
from lapilli.modality.image.image import ImageModality
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.prompt.tokenizer.fast import FastTokenizer

DEFAULT_CONTEXT = 2048
CHANGES = ("quantization_config", "overwrite_config", "customized_config")
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")

CLASSES = {
    "llama": models.LlavaLlamaForCausalLM,
    "mistral": models.LlavaMistralForCausalLM,
    "mpt": models.LlavaMptForCausalLM,
    "qwen2": models.LlavaQwenForCausalLM,
}

LoadedTuple = tuple[PreTrainedTokenizer, Any, CLIPImageProcessor | None, int]


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Foreign = "auto",
    device: str | torch.device = "cuda",
    use_flash_attn: bool = False,
    *,
    torch_dtype: torch.dtype | str | None = None,
    **options: object,
) -> LoadedTuple:
    """Return (tokenizer, model, image_processor, context_len) of a checkpoint.

    Args:
        model_path: a directory or a hub id.
        model_base: the language model under a LoRA or a projector-only checkpoint.
        model_name: decides between the Llama and the Mistral class and their tokenizers, as in the
            original (quirk 11); for everything else the files say what a checkpoint is.
        load_8bit: refused.
        load_4bit: refused.
        device_map: "auto", a device, {"": device}, or None for the CPU.
        device: every name of a GPU takes the CPU where there is none.
        use_flash_attn: taken and not needed: torch chooses the kernel.
        torch_dtype: of the weights; None: float16 on a GPU, float32 on a CPU.
        options: of later versions and of transformers; those of CHANGES are refused, the others
            (attn_implementation, multimodal, cache_dir, ...) do not change an answer.

    Raises:
        UnsupportedModelError: 8 or 4 bits or another configuration are asked for.
        CheckpointError: files are missing, damaged or do not belong together.

    Note: the original decides by parts of model_name, always loads float16, and may leave the tower
        on another device than the rest.
    """
    for name in CHANGES:
        if options.get(name):
            raise UnsupportedModelError(
                f"{name} would change what is loaded, which is not there: load without it"
            )
    if load_8bit or load_4bit:
        raise UnsupportedModelError(
            f"load_{'8' if load_8bit else '4'}bit is not there yet: load without it, for instance "
            "with torch_dtype=torch.bfloat16"
        )
    place = _choose_device(device, device_map)
    if torch_dtype is None:
        torch_dtype = torch.float32 if place.type == "cpu" else torch.float16
    loaded = load_checkpoint(model_path, base=model_base, device=place, dtype=torch_dtype)
    family = named_family(loaded, model_name, has_base=model_base is not None)
    return wrap_loaded(loaded, family)


def named_family(loaded: Loaded, model_name: str | None, *, has_base: bool) -> str:
    """Return the class that the original takes: `llama`, `mistral` or `mpt`.

    Note: quirk 11. It goes by the name: a Mistral checkpoint without "mistral" in its name, and
        every LoRA or projector on a Mistral base, becomes the Llama class with the slow tokenizer.
    """
    family = loaded.config.text.family
    if model_name is None or "llava" not in model_name.lower() or family == "mpt":
        return family
    return "mistral" if "mistral" in model_name.lower() and not has_base else "llama"


def wrap_loaded(loaded: Loaded, family: str) -> LoadedTuple:
    """Return a checkpoint of ours as the original returns it.

    Args:
        loaded: the checkpoint; its weights are shared, not copied.
        family: `llama`, `mistral`, ...: the class of the model and of the tokenizer.
    """
    folder = loaded.tokenizer_path
    tokenizer = wrap_tokenizer(_tokenizer(loaded, folder, fast=family != "llama"), folder)
    model = _build_model(loaded, family)
    model.generation_config = _generation_config(loaded)
    tower = getattr(model.base_model, "vision_tower", None)
    processor = None if tower is None else tower.image_processor
    return (
        tokenizer,
        model,
        processor,
        getattr(model.config, "max_sequence_length", None) or DEFAULT_CONTEXT,
    )


def _build_model(loaded: Loaded, family: str) -> Foreign:
    """Return a model of transformers with our weights in it."""
    language_model = loaded.model.language_model
    if isinstance(language_model, ForeignLanguageModel):
        return language_model.inner
    if family not in CLASSES:
        raise UnsupportedModelError(
            f"the names of the original have no {family} language model, only "
            f"{', '.join(CLASSES)}: use lapilli.load"
        )
    kind: Any = CLASSES[family]
    raw = _flat_config(loaded)
    images = None
    if loaded.config.image is None:
        kind = kind._original
    else:
        images = loaded.model.modality("image")
    parameters = loaded.model.state_dict()
    text = {name: value for name, value in parameters.items() if name.startswith(TEXT)}
    state: dict[str, Any] = LANGUAGE_MODEL.rename(text)
    bare = {key: value for key, value in raw.items() if key != "mm_vision_tower"}
    model = filled(kind, kind.config_class(**bare), state)
    model.config._name_or_path = str(loaded.path)
    if isinstance(images, ImageModality):
        model.config.mm_vision_tower = raw["mm_vision_tower"]
        tower = {name: value for name, value in parameters.items() if name.startswith(TOWER)}
        _attach(model, images, VISION_TOWER.rename(tower))
    return model.eval()


def _attach(model: Foreign, images: ImageModality, tower: Mapping[str, Any]) -> None:
    """Put tower, projector and the end of a row where the original has them."""
    stack = model.base_model
    stack.vision_tower = CLIPVisionTower(model.config.mm_vision_tower, model.config, True)
    stack.vision_tower.adopt(vision_config(images.vision), tower, images.image.pixels)
    stack.mm_projector = images.projector
    if images.image_newline is not None:
        stack.image_newline = nn.Parameter(images.image_newline.data)


def _flat_config(loaded: Loaded) -> dict[str, Any]:
    """Return the keys of config.json, flat as the original has them."""
    config = loaded.config
    raw = dict(loaded.raw)
    if config.layout != "llava":
        raw = {key: value for key, value in raw.items() if not isinstance(value, Mapping)}
        raw |= write_llava_config(
            # Its tower is attached below; the original has no name for leaving out a first patch.
            replace(
                as_original(config),
                vision_in_checkpoint=False,
                vision=config.vision and replace(config.vision, feature_select="patch"),
            ),
            vision_source=None,
            torch_dtype="float32",
        )
        if config.vision is not None:
            feature = config.vision.feature_select
            source = config.vision_source or ""
            raw |= {"mm_vision_tower": source, "mm_vision_select_feature": feature}
    raw |= {"vocab_size": config.text.vocab_size}
    for key in ("model_type", "architectures", "quantization_config", "torch_dtype", "dtype"):
        raw.pop(key, None)
    name: Any = raw.get("mm_vision_tower")
    if name:
        # By its full path: what is saved from here on lies elsewhere.
        raw["mm_vision_tower"] = str(find_directory(name, beside=(loaded.path,)) or name)
    return raw


def _tokenizer(loaded: Loaded, folder: Path, *, fast: bool) -> Tokenizer:
    """Return the tokenizer of the class that the original takes, with its added tokens."""
    is_fast = isinstance(loaded.tokenizer, FastTokenizer)
    if loaded.config.layout != "llava" or fast == is_fast:
        return loaded.tokenizer
    tokenizer = load_tokenizer(folder, fast=fast)
    tokens = loaded.config.tokens
    add_image_tokens(
        tokenizer, use_patch=tokens.use_patch_token, use_start_end=tokens.use_start_end
    )
    return tokenizer


def _generation_config(loaded: Loaded) -> GenerationConfig:
    """Return generation_config.json over what config.json says of generation.

    Note: the release that the original is pinned to takes config.json alone where the file says
        `_from_model_config`, and else the file alone; without max_length it ends after 20 ids.
    """
    names = GenerationConfig().to_dict().keys() - {"transformers_version"}
    said = {key: value for key, value in loaded.raw.items() if key in names and value is not None}
    stored = dict(read_optional_json(loaded.path / "generation_config.json") or {})
    if stored and not stored.pop("_from_model_config", False):
        said = {key: value for key, value in said.items() if key.endswith("_token_id")}
    return GenerationConfig(**{"max_length": 20, **said, **stored})


def _choose_device(device: str | torch.device, device_map: Foreign) -> torch.device:
    """Return where everything goes, the tower too; without a map that is the CPU."""
    asked: Any = device
    if str(device) == "cuda" and device_map not in SPREADS:
        asked = device_map.get("", device) if isinstance(device_map, Mapping) else device_map
    return torch.device(present("cpu" if asked is None else asked))
