"""What the original's training program starts from: base, tower and projector together."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lapilli.checkpoint.formats.files import read_json
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.source import resolve
from lapilli.compat.builder import LoadedTuple, wrap_loaded
from lapilli.compat.models import LlavaForCausalLM
from lapilli.compat.training_arguments import TrainingArguments
from lapilli.config.projector import parse_projector
from lapilli.errors import CheckpointError, ConfigError
from lapilli.lora import LoraConfig, inject
from lapilli.modality.projector import build_projector
from lapilli.shapes import Tensor

EMBEDDINGS = "model.embed_tokens.weight"
WRAPPER = "base_model.model."

Initial = Mapping[str, Tensor]


def build_model(arguments: TrainingArguments, initial: Initial) -> LoadedTuple:
    """The base with tower and projector, in float32 (bfloat16 with `--bf16 True`).

    Args:
        arguments: of the program.
        initial: parameters to start from in place of random ones, by their original names.

    Raises:
        KeyError: start and end tokens with an adapter file that has no embeddings (quirk 17).
        CheckpointError: base, tower or adapter are missing or do not belong together.
    """
    base = resolve(arguments.model_name_or_path)
    with tempfile.TemporaryDirectory(prefix="llava-") as folder:
        staged = Path(folder)
        raw = starting_config(arguments, read_json(base / "config.json"))
        (staged / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        weights = _adapter(arguments, raw, initial)
        # Cloned: tensors that share one storage would be stored together.
        torch.save({k: v.clone() for k, v in weights.items()}, staged / "mm_projector.bin")
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        loaded = load_checkpoint(staged, base=str(base), device="auto", dtype=dtype)
        # Quirk 11: by the name of the base, and Mistral bases are trained as Llama.
        family = "mpt" if loaded.config.text.family == "mpt" else "llama"
        return wrap_loaded(loaded, family, tokenizer_path=base)


def starting_config(arguments: TrainingArguments, base: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model that training makes: the base's keys and the `mm_` keys.

    Raises:
        ConfigError: a base that the training program does not know.
    """
    kind = str(base.get("model_type", "llama")).removeprefix("llava_")
    if kind not in ("llama", "mistral", "mpt"):
        raise ConfigError(
            f"{arguments.model_name_or_path} is a {kind}: expected llama, mistral, mpt"
        )
    tower = resolve(arguments.vision_tower)
    vision = read_json(tower / "config.json")
    sizes = vision.get("vision_config", vision)
    return dict(base) | {
        "model_type": f"llava_{kind}",
        "mm_vision_tower": str(tower),
        "use_mm_proj": True,
        "mm_hidden_size": sizes["hidden_size"],  # type: ignore[index]  # parsed JSON
        "mm_projector_type": arguments.mm_projector_type,
        "mm_vision_select_layer": arguments.mm_vision_select_layer,
        "mm_vision_select_feature": arguments.mm_vision_select_feature,
        "mm_patch_merge_type": arguments.mm_patch_merge_type,
        "image_aspect_ratio": arguments.image_aspect_ratio,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": arguments.model_max_length,
        "tune_mm_mlp_adapter": arguments.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": arguments.freeze_mm_mlp_adapter,
        "mm_use_im_start_end": arguments.mm_use_im_start_end,
        "mm_use_im_patch_token": arguments.mm_use_im_patch_token,
        "mm_projector_lr": arguments.mm_projector_lr,
        "use_cache": True,
    }


def _adapter(
    arguments: TrainingArguments, raw: Mapping[str, Any], initial: Initial
) -> dict[str, Tensor]:
    """What mm_projector.bin holds: the pretrained adapter, or a fresh projector."""
    given = {
        name.removeprefix(WRAPPER): value
        for name, value in initial.items()
        if "mm_projector" in name
    }
    if not arguments.pretrain_mm_mlp_adapter:
        return given or _fresh_projector(raw)
    path = Path(arguments.pretrain_mm_mlp_adapter)
    if not path.is_file():
        raise CheckpointError(f"--pretrain_mm_mlp_adapter {path}: no such file")
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    if arguments.mm_use_im_start_end and EMBEDDINGS not in weights:
        raise KeyError(EMBEDDINGS)
    return weights


def _fresh_projector(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Torch's own start, as the original's projectors begin."""
    config = parse_projector(
        str(raw["mm_projector_type"]),
        vision_size=raw["mm_hidden_size"],
        hidden_size=raw.get("hidden_size", raw.get("d_model")),
    )
    projector = build_projector(replace(config, pool=1))  # pooling has no weights of its own
    return {f"model.mm_projector.{name}": p.detach() for name, p in projector.named_parameters()}


def choose_trainable(model: LlavaForCausalLM, arguments: TrainingArguments) -> None:
    """Mark what is trained.

    Source: LLaVA train.py: the tower never; with a LoRA the adapters and the projector; with
    tune_mm_mlp_adapter the projector (and new input embeddings); with freeze_backbone all but the
    stack under the head.
    """
    stack = model.stack_name
    for name, parameter in model.named_parameters():
        in_projector = "mm_projector" in name or "image_newline" in name
        in_backbone = name.startswith(f"{stack}.") and not in_projector
        trains = in_projector or not arguments.tune_mm_mlp_adapter
        if arguments.freeze_backbone and in_backbone:
            trains = False
        if "mm_projector" in name and arguments.freeze_mm_mlp_adapter:
            trains = False
        if arguments.lora_enable and not in_projector:
            trains = ".lora_" in name
        parameter.requires_grad_(trains and ".vision_tower." not in name)
    if arguments.tune_mm_mlp_adapter and arguments.mm_use_im_start_end:
        model.get_input_embeddings().requires_grad_(True)


def add_lora(model: LlavaForCausalLM, arguments: TrainingArguments, initial: Initial) -> None:
    """A fresh adapter beside every linear layer of the language model's stack."""
    language_model = model.inner.language_model
    if not isinstance(language_model, nn.Module):
        raise ConfigError("this language model has no modules to adapt")
    targets = tuple(
        f"language_model.{path}"
        for path, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    )
    config = LoraConfig(
        rank=arguments.lora_r,
        alpha=arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        targets=targets,
    )
    inject(model.inner, config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in initial.items():
            ours = name.removeprefix(WRAPPER).replace(".default.", ".")
            if ".lora_" in ours:
                parameters[ours].copy_(value)
