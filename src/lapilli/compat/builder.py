"""load_pretrained_model of the original (llava.model.builder) over our own loading."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lapilli.checkpoint.formats.files import read_optional_json
from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.checkpoint.tokenizer import add_image_tokens, has_tokenizer, load_tokenizer
from lapilli.compat.configuration import build_config
from lapilli.compat.foreign import Foreign
from lapilli.compat.generation import GenerationDefaults
from lapilli.compat.image_processor import CLIPImageProcessor
from lapilli.compat.models import (
    LlavaForCausalLM,
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaMptForCausalLM,
)
from lapilli.compat.tokenizer import PreTrainedTokenizer, wrap_tokenizer
from lapilli.errors import UnsupportedModelError
from lapilli.lm.decoder import Decoder
from lapilli.model.vlm import VisionLanguageModel
from lapilli.prompt.tokenizer import FastTokenizer, Tokenizer

DEFAULT_CONTEXT = 2048

CLASSES = {"mistral": LlavaMistralForCausalLM, "mpt": LlavaMptForCausalLM}

LoadedTuple = tuple[PreTrainedTokenizer, LlavaForCausalLM, CLIPImageProcessor | None, int]


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
    **_: object,
) -> LoadedTuple:
    """(tokenizer, model, image_processor, context_len).

    Args:
        model_path: a directory or a hub id.
        model_base: the language model under a LoRA or a projector-only checkpoint.
        model_name: decides between the Llama and the Mistral class and their tokenizers, as in the
            original (quirk 11); for everything else the files say what a checkpoint is.
        load_8bit: refused.
        load_4bit: refused.
        device_map: "auto", a device, or {"": device}.
        device: "cuda" takes the CPU where there is no GPU.
        use_flash_attn: taken and not needed: torch chooses the kernel.
        torch_dtype: of the weights; None: float16 on a GPU, float32 on a CPU.

    Raises:
        UnsupportedModelError: 8 or 4 bits are asked for.
        CheckpointError: files are missing, damaged or do not belong together.

    Note: the original decides by parts of model_name, always loads float16, and may leave the tower
        on another device than the rest.
    """
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
    return wrap_loaded(loaded, family, tokenizer_path=Path(model_base) if model_base else None)


def named_family(loaded: Loaded, model_name: str | None, *, has_base: bool) -> str:
    """The class that the original takes: `llama`, `mistral` or `mpt`.

    Note: quirk 11. It goes by the name: a Mistral checkpoint without "mistral" in its name, and
        every LoRA or projector on a Mistral base, becomes the Llama class with the slow tokenizer.
    """
    family = loaded.config.text.family
    if model_name is None or "llava" not in model_name.lower() or family == "mpt":
        return family
    return "mistral" if "mistral" in model_name.lower() and not has_base else "llama"


def wrap_loaded(loaded: Loaded, family: str, *, tokenizer_path: Path | None = None) -> LoadedTuple:
    """A checkpoint of ours as the original returns it.

    Args:
        loaded: the checkpoint.
        family: `llama`, `mistral` or `mpt`: the class of the model and of the tokenizer.
        tokenizer_path: where the tokenizer's files are when they are not in the checkpoint.
    """
    config = build_config(loaded.raw, loaded.config)
    own = has_tokenizer(loaded.path) or tokenizer_path is None
    folder = loaded.path if own or tokenizer_path is None else tokenizer_path
    tokenizer = wrap_tokenizer(_tokenizer(loaded, folder, fast=family != "llama"), folder)
    forget_window(loaded.model)
    image = loaded.config.image
    processor = None if image is None else CLIPImageProcessor(image.pixels)
    model = CLASSES.get(family, LlavaLlamaForCausalLM)(
        loaded.model,
        config,
        tokenizer=tokenizer,
        defaults=_generation_defaults(loaded),
        processor=processor,
    )
    return tokenizer, model, processor, config.get("max_sequence_length", DEFAULT_CONTEXT)


def forget_window(model: VisionLanguageModel) -> None:
    """Let every position see all before it, whatever `sliding_window` says.

    Note: the transformers release that the original is pinned to leaves Mistral's window out of its
        default attention (it came back with 4.40); our own API keeps it.
    """
    language_model = model.language_model
    if isinstance(language_model, Decoder) and language_model.config.sliding_window is not None:
        language_model.config = replace(language_model.config, sliding_window=None)


def _tokenizer(loaded: Loaded, folder: Path, *, fast: bool) -> Tokenizer:
    """The tokenizer of the class that the original takes, with its added tokens."""
    is_fast = isinstance(loaded.tokenizer, FastTokenizer)
    if loaded.config.layout != "llava" or fast == is_fast:
        return loaded.tokenizer
    tokenizer = load_tokenizer(folder, fast=fast)
    tokens = loaded.config.tokens
    add_image_tokens(
        tokenizer, use_patch=tokens.use_patch_token, use_start_end=tokens.use_start_end
    )
    return tokenizer


def _generation_defaults(loaded: Loaded) -> GenerationDefaults:
    """generation_config.json over the special ids of config.json, as transformers has it."""
    named = {name: loaded.raw.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    raw = {f"{name}_token_id": value for name, value in named.items() if value is not None}
    return GenerationDefaults.of(
        raw | dict(read_optional_json(loaded.path / "generation_config.json") or {})
    )


def _choose_device(device: str | torch.device, device_map: Foreign) -> torch.device:
    """Where everything goes, the tower too."""
    asked: Any = device
    if str(device) == "cuda" and device_map != "auto":
        asked = device_map.get("", device) if isinstance(device_map, dict) else device_map
    if str(asked) in ("auto", "cuda") and not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda" if asked == "auto" else asked)
