"""What the original's training program leaves in its output folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lapilli.checkpoint.source import resolve
from lapilli.compat.models import LlavaForCausalLM
from lapilli.compat.tokenizer import PreTrainedTokenizer
from lapilli.compat.training_arguments import TrainingArguments
from lapilli.prompt.choose import RECORD_KEY
from lapilli.prompt.templates import DEFAULT_TEMPLATE, TEMPLATES
from lapilli.shapes import Tensor

WRAPPER = "base_model.model."
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def save_results(
    model: LlavaForCausalLM,
    tokenizer: PreTrainedTokenizer,
    arguments: TrainingArguments,
    state: Mapping[str, Any],
) -> None:
    """Projector alone, adapter with what was trained beside it, or the whole model.

    Source: LLaVA train.py, the end of train(), and safe_save_model_for_hf_trainer.
    """
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "trainer_state.json", dict(state))
    if arguments.lora_enable:
        _save_lora(model, arguments, folder)
    elif arguments.tune_mm_mlp_adapter:
        _save_projector(model, arguments, folder)
    else:
        _save_whole(model, tokenizer, arguments, folder)


def _save_projector(model: LlavaForCausalLM, arguments: TrainingArguments, folder: Path) -> None:
    keys = ["mm_projector"] + (["embed_tokens"] if arguments.mm_use_im_start_end else [])
    named = {k: v for k, v in _weights(model).items() if any(key in k for key in keys)}
    torch.save(named, folder / "mm_projector.bin")
    _write(folder / "config.json", model.config.to_dict() | recorded(arguments))


def _save_lora(model: LlavaForCausalLM, arguments: TrainingArguments, folder: Path) -> None:
    trained = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    halves = {WRAPPER + name: value for name, value in trained.items() if ".lora_" in name}
    others = {WRAPPER + name: value for name, value in trained.items() if ".lora_" not in name}
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.save(others, folder / "non_lora_trainables.bin")
    targets = {name.split(".lora_")[0].split(".")[-1] for name in halves}
    _write(folder / "adapter_config.json", adapter_config(arguments, sorted(targets)))
    _write(folder / "config.json", model.config.to_dict() | recorded(arguments))
    (folder / "README.md").write_text(
        "---\nlibrary_name: peft\n---\n\nA LoRA adapter trained with "
        f"{arguments.model_name_or_path} as its base.\n",
        encoding="utf-8",
    )


def recorded(arguments: TrainingArguments) -> dict[str, str]:
    """The template of the conversations, for our own loader; captions (plain) say nothing.

    Source: LLaVA train.py: v0 and v0.5 leave the default, an unknown version takes vicuna_v1.
    """
    version = arguments.version
    if "plain" in version:
        return {}
    is_named = version in TEMPLATES and version not in ("v0", "v0.5")
    return {RECORD_KEY: version if is_named else DEFAULT_TEMPLATE}


def adapter_config(arguments: TrainingArguments, targets: list[str]) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.7 writes it."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": arguments.model_name_or_path,
        "bias": arguments.lora_bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": arguments.lora_alpha,
        "lora_dropout": arguments.lora_dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": arguments.lora_r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }


def _save_whole(
    model: LlavaForCausalLM,
    tokenizer: PreTrainedTokenizer,
    arguments: TrainingArguments,
    folder: Path,
) -> None:
    """Everything, the frozen tower included (quirk 17)."""
    save_file(_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | recorded(arguments)
    config |= {
        "architectures": [type(model).__name__],
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    _write(folder / "config.json", config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {name: model.config.get(name) for name in ids if model.config.get(name) is not None}
    _write(folder / "generation_config.json", {"_from_model_config": True, **known})
    base = resolve(arguments.model_name_or_path)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    added = {t: i for t, i in tokenizer.get_added_vocab().items() if i >= tokenizer.vocab_size}
    if added:
        _write(folder / "added_tokens.json", added)


def _weights(model: LlavaForCausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
