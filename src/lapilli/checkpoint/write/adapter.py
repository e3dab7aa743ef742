"""Writer of LoRA adapters: the original's folder, or a PEFT adapter on a Hugging Face checkpoint.

    the original's   config.json  adapter_config.json  adapter_model.safetensors
                     non_lora_trainables.bin (the projector and what else was trained whole)
    PEFT             adapter_config.json  adapter_model.safetensors, the projector among its tensors

Both with the tokenizer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from lapilli.checkpoint.keymaps import (
    PROJECTOR,
    TEXT,
    KeyMap,
    is_joint,
    original_keymap,
)
from lapilli.checkpoint.read.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WRAPPER
from lapilli.checkpoint.read.plan import NON_LORA_FILES
from lapilli.checkpoint.template import WrittenTemplate, written_template
from lapilli.checkpoint.tokenizer import load_tokenizer, write_beside
from lapilli.checkpoint.write.files import (
    Deferred,
    Stored,
    new_directory,
    value,
    write_json,
    write_pickled,
    write_safetensors,
)
from lapilli.checkpoint.write.llava import (
    as_original,
    check_declared,
    config_of_part,
)
from lapilli.config.model import ModelConfig
from lapilli.errors import CheckpointError, ConfigError, UnsupportedModelError
from lapilli.lora import adapter_tensors, adapters
from lapilli.model import VisionLanguageModel
from lapilli.prompt.choose import Template

# Modules of LLaVA in transformers since 4.52, among which PEFT looks for targets.
HF_MODULES = KeyMap(
    "modules of Hugging Face's LLaVA",
    (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.linear_1.", f"{PROJECTOR}0."),
        ("model.multi_modal_projector.linear_2.", f"{PROJECTOR}2."),
    ),
)
_HF_PROJECTOR = "multi_modal_projector"


def save_adapter(
    path: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    *,
    layout: str,
    base: str,
    trained: Sequence[str] = (),
    tokenizer_path: Path | None = None,
    template: str | Template | None = None,
    overwrite: bool = False,
    state: Mapping[str, Stored] | None = None,
    extra: Mapping[str, str | bytes] | None = None,
) -> None:
    """Save an unmerged adapter, and the projector with it.

    The layout is "llava", that of the original's training, whose loader needs "llava" and "lora" in
    the name of the directory, or "huggingface", for PEFT on a checkpoint in that layout, where the
    template is written as chat_template.jinja. `base` is the checkpoint below, written as
    `base_model_name_or_path`; `trained` are parameters that were trained whole. The other arguments
    are those of `save_llava`.

    Raises:
        CheckpointError: the directory is there already, or the disk is full.
        ConfigError: the model has no adapter, or its tower no name.
        UnsupportedModelError: a parameter was trained whole that a PEFT adapter cannot hold.
    """
    is_original = layout == "llava"
    beyond = [name for name in trained if not name.startswith(PROJECTOR)]
    if beyond and not is_original:
        raise UnsupportedModelError(
            f"a PEFT adapter cannot carry {beyond[0]} ({len(beyond)} such parameters): it holds "
            "adapters and the projector; save it merged, or in the layout of the original"
        )
    if not any(True for _ in adapters(model)):
        raise ConfigError("the model has no adapter: save_llava saves a whole model")
    written = written_template(template, config, tokenizer_path)
    jinja = written.jinja if is_original else _chat_template(written, config, tokenizer_path)
    config = as_original(config) if is_original else config
    keymap = original_keymap(config.text) if is_original else HF_MODULES
    state = model.state_dict() if state is None else state
    check_declared(state, config)
    halves, others = _split(model, state, keymap, trained)
    settings = _adapter_config(model, base, keymap)
    with new_directory(path, overwrite=overwrite) as folder:
        if is_original:
            settings["task_type"] = "CAUSAL_LM"
            write_safetensors(folder / ADAPTER_WEIGHTS[0], halves)
            write_pickled(folder / NON_LORA_FILES[-1], others)
            write_json(folder / "config.json", config_of_part(folder, model, config, written.name))
        else:
            settings["modules_to_save"] = [_HF_PROJECTOR]
            write_safetensors(folder / ADAPTER_WEIGHTS[0], {**halves, **others})
        write_json(folder / ADAPTER_CONFIG, settings)
        write_beside(folder, tokenizer_path, extra, jinja=jinja, tokens=config.tokens)


def _chat_template(
    template: WrittenTemplate, config: ModelConfig, tokenizer_path: Path | None
) -> str | None:
    """Return the template of an adapter as jinja, which is its only place in the folder."""
    if tokenizer_path is None or config.tokens.image_id is None:
        return template.jinja
    tokenizer = load_tokenizer(tokenizer_path, fast=True)
    return template.for_whole_prompts(tokenizer, config.tokens.image_id, was_whole=True)


def is_unknown_to_peft(path: str) -> bool:
    """Return whether PEFT has no name for an adapter on the module of this path."""
    return HF_MODULES.to_foreign(f"{path}.weight") is None


def _split(
    model: VisionLanguageModel,
    state: Mapping[str, Stored],
    keymap: KeyMap,
    trained: Sequence[str],
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Return the halves of the adapter, and the projector with other parameters trained whole."""
    halves: dict[str, Stored] = {}
    for name in adapter_tensors(model):
        module, _, half = name.removesuffix(".weight").rpartition(".")
        foreign = _module(module, keymap)
        halves[f"{WRAPPER}{foreign}.{half}.weight"] = state[name]
    beside = {
        name: tensor
        for name, tensor in state.items()
        if ".lora_" not in name and (is_joint(name) or name in trained)
    }
    others = {WRAPPER + name: tensor for name, tensor in keymap.rename(beside).items()}
    return halves, others


def _module(path: str, keymap: KeyMap) -> str:
    foreign = keymap.to_foreign(f"{path}.weight")
    if foreign is None:
        raise CheckpointError(f"{path} has no name in the layout {keymap.name!r}")
    return foreign.removesuffix(".weight")


def _targets(model: VisionLanguageModel, keymap: KeyMap) -> list[str]:
    """Return the last parts of the module names if they match no other module, else full names.

    In the original's layout they match modules of the language model only: its programs create the
    adapter before the tower.
    """
    adapted = [path for path, _ in adapters(model)]
    ends = {path.rpartition(".")[2] for path in adapted}
    meant = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in ends}
    if keymap is not HF_MODULES:
        meant = {path for path in meant if path.startswith(TEXT)}
    if meant == set(adapted):
        return sorted(ends)
    return [_module(path, keymap) for path in adapted]


def _adapter_config(model: VisionLanguageModel, base: str, keymap: KeyMap) -> dict[str, object]:
    """Return adapter_config.json, with patterns for modules of another rank or alpha.

    A scale is alpha / rank there, so alpha is computed from the scale (also with rslora).
    """
    layers = {_module(path, keymap): layer for path, layer in adapters(model)}
    ranks = {name: layer.lora_A.out_features for name, layer in layers.items()}
    alphas = {name: _tidy(layer.scaling * ranks[name]) for name, layer in layers.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    return {
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(layers.values())).dropout.p,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "revision": None,
        "target_modules": _targets(model, keymap),
        "task_type": None,
    }


def _tidy(number: float) -> int | float:
    """Return a whole number as an int; products of floats are off by their last digit."""
    return round(number) if abs(number - round(number)) < 1e-9 * abs(number) else number


def merged_state(
    model: VisionLanguageModel, state: Mapping[str, Stored] | None = None
) -> dict[str, Stored]:
    """Return the tensors of a model with every adapter merged; `model` is left as it is.

    A merged layer is computed when it is written, so that memory holds one layer more than the
    model. `state` are other tensors under the names of `model.state_dict()`.
    """
    whole = model.state_dict() if state is None else state
    merged = dict(whole)
    for path, layer in adapters(model):
        down, up = (merged.pop(f"{path}.{half}.weight") for half in ("lora_A", "lora_B"))
        weight = whole[f"{path}.weight"]
        make = partial(_folded, weight, down, up, layer.scaling)
        merged[f"{path}.weight"] = Deferred(weight.shape, weight.dtype, make)
    return merged


def _folded(weight: Stored, down: Stored, up: Stored, scaling: float) -> Tensor:
    """Return W + scaling * B A, summed in float32."""
    update = scaling * (value(up).float() @ value(down).float())
    return (value(weight).float() + update).to(weight.dtype)
