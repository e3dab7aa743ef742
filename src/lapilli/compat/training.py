"""Training program of the original (llava.train.train): its options as a recipe for lapilli.

    options --recipe_of--> Recipe --launch--> output_dir/.lapilli --save--> the original's files

python -m lapilli.compat -m llava.train.train --model_name_or_path BASE --vision_tower CLIP ...

Steps, data and state are lapilli.train's. A run that was killed goes on with the same command.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lapilli.checkpoint.formats.files import RESULTS, read_json
from lapilli.checkpoint.source import resolve
from lapilli.checkpoint.write.files import write_json
from lapilli.compat.arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
    recipe_of,
    template_of,
)
from lapilli.compat.builder import wrap_loaded
from lapilli.compat.tower import build_vision_projector
from lapilli.compat.trainer import (
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    find_all_linear_names,
    make_supervised_data_module,
    preprocess,
    preprocess_multimodal,
    safe_save_model_for_hf_trainer,
    smart_tokenizer_and_embedding_resize,
)
from lapilli.errors import CheckpointError, ConfigError
from lapilli.prompt.choose import RECORD_KEY
from lapilli.train.distributed import joined, rank_info_of
from lapilli.train.launch import TrainingTask, launch
from lapilli.train.trainer.loop import number_of_steps
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.optim import lr_share

__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "find_all_linear_names",
    "make_supervised_data_module",
    "preprocess",
    "preprocess_multimodal",
    "safe_save_model_for_hf_trainer",
    "smart_tokenizer_and_embedding_resize",
    "train",
]

EMBEDDINGS = "model.embed_tokens.weight"
RECORDED = (
    *("mm_projector_type", "mm_projector_lr", "mm_vision_select_layer", "mm_vision_select_feature"),
    *("mm_patch_merge_type", "image_aspect_ratio", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"),
    *("mm_use_im_start_end", "mm_use_im_patch_token"),
)
"""Options that config.json has by the same names."""


def train(
    attn_implementation: str | None = None, *, arguments: Sequence[str] | None = None
) -> None:
    """Train as `arguments` say and write the original's files to their output_dir.

    Args:
        attn_implementation: taken and not needed: torch chooses the kernel.
        arguments: options; None: those of the command line.

    Raises:
        ConfigError: an option that is unknown or missing.
        NotImplementedError: start and end tokens with tune_mm_mlp_adapter (quirk 17).
        LapilliError: see lapilli.train.launch.
    """
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    model, _, training = parsed
    if model.tune_mm_mlp_adapter and model.mm_use_im_start_end:
        raise NotImplementedError(
            "the original has no start and end tokens together with tune_mm_mlp_adapter: leave one "
            "of them out, or use lapilli train"
        )
    output = Path(training.output_dir)
    folder = output / ".lapilli"
    config = starting_config(parsed)
    recipe = recipe_of(parsed, folder / "start", config)
    ranks = rank_info_of(os.environ)
    with joined(ranks, sharding=recipe.run.sharding, device="auto") as parallel:
        if parallel.is_main_process and not (folder / "start").exists():
            stage(folder / "start", parsed, config)
        parallel.wait()
        task = launch(recipe, folder, parallel=parallel, echo=parallel.is_main_process)
        if parallel.is_main_process:
            _save(task, parsed, config, folder)
            shutil.rmtree(folder)
        parallel.wait()


def starting_config(parsed: Arguments) -> dict[str, Any]:
    """Return config.json of the model that training makes: the base's keys and the `mm_` keys.

    Raises:
        ConfigError: a base that the training program does not know.
    """
    model, data, training = parsed
    base = resolve(model.model_name_or_path)
    raw = read_json(base / "config.json")
    kind = str(raw.get("model_type", "llama")).removeprefix("llava_")
    if kind not in ("llama", "mistral", "mpt"):
        raise ConfigError(f"{model.model_name_or_path} is a {kind}: expected llama, mistral, mpt")
    tower = resolve(str(model.vision_tower))
    vision = read_json(tower / "config.json")
    sizes: Any = vision.get("vision_config", vision)
    named = {} if "plain" in model.version else {RECORD_KEY: template_of(model.version)}
    given = {**vars(model), **vars(data), **vars(training)}
    return {
        **raw,
        "_name_or_path": str(base),
        "model_type": f"llava_{kind}",
        "mm_vision_tower": str(tower),
        "use_mm_proj": True,
        "mm_hidden_size": sizes["hidden_size"],
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": training.model_max_length,
        "use_cache": True,
        **{name: given[name] for name in RECORDED},
        **named,
    }


def stage(folder: Path, parsed: Arguments, config: Mapping[str, Any]) -> None:
    """Write what the run starts from: a projector-only checkpoint over the base.

    Raises:
        KeyError: start and end tokens with an adapter file that has no embeddings (quirk 17).
        CheckpointError: there is no such adapter file.
    """
    model, _, training = parsed
    torch.manual_seed(training.seed)
    if model.pretrain_mm_mlp_adapter in (None, "None"):
        sizes = {"hidden_size": config.get("hidden_size", config.get("d_model"))} | dict(config)
        projector = build_vision_projector(SimpleNamespace(**sizes))
        weights = {f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}
    else:
        path = Path(str(model.pretrain_mm_mlp_adapter))
        if not path.is_file():
            raise CheckpointError(f"--pretrain_mm_mlp_adapter {path}: no such file")
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if model.mm_use_im_start_end and EMBEDDINGS not in weights:
            raise KeyError(EMBEDDINGS)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    torch.save(
        {name: tensor.clone() for name, tensor in weights.items()}, folder / "mm_projector.bin"
    )


def _save(task: TrainingTask, parsed: Arguments, config: dict[str, Any], folder: Path) -> None:
    """Leave the files of the original: a projector, an adapter, or the whole model.

    Source: LLaVA train.py, the end of train(), and safe_save_model_for_hf_trainer.
    """
    model, _, training = parsed
    output, results = Path(training.output_dir), folder / RESULTS
    config = config | {"vocab_size": task.loaded.config.text.vocab_size}
    if training.lora_enable:
        for name in ("adapter_model.safetensors", "non_lora_trainables.bin", "README.md"):
            shutil.copyfile(results / name, output / name)
        written = read_json(results / "adapter_config.json")
        write_json(output / "adapter_config.json", peft_defaults(written, model.model_name_or_path))
    elif model.tune_mm_mlp_adapter:
        shutil.copyfile(results / "mm_projector.bin", output / "mm_projector.bin")
    else:
        # Everything, the frozen tower included (quirk 17).
        loaded = replace(task.loaded, model=task.model.vlm.to("cpu"))
        tokenizer, whole, _, _ = wrap_loaded(loaded, loaded.config.text.family)
        whole.save_pretrained(output)
        tokenizer.padding_side, tokenizer.model_max_length = "right", training.model_max_length
        tokenizer.save_pretrained(output)
        config |= {"architectures": [type(whole).__name__], "torch_dtype": "float32"}
    write_json(output / "config.json", config)
    write_json(output / "trainer_state.json", _state(task, folder))


def peft_defaults(written: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return adapter_config.json with the keys of PEFT 0.7; targets by the last part of a name."""
    targets = {str(path).rpartition(".")[2] for path in written["target_modules"]}
    empty = ("auto_mapping", "layers_pattern", "layers_to_transform", "megatron_config")
    return {
        **dict.fromkeys((*empty, "modules_to_save", "revision")),
        "alpha_pattern": {},
        "rank_pattern": {},
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **written,
        "base_model_name_or_path": base,
        "target_modules": sorted(targets),
    }


def _state(task: TrainingTask, folder: Path) -> dict[str, Any]:
    """Return trainer_state.json: the loss of every step, and the learning rate after it."""
    recipe = task.recipe
    steps = number_of_steps(task, recipe.run)
    history = [
        {
            "step": record["step"],
            "loss": record["loss"],
            "learning_rate": recipe.optim.lr * lr_share(int(record["step"]), steps, recipe.optim),
        }
        for record in RunLog(folder).records()
        if "loss" in record
    ]
    return {"global_step": steps, "max_steps": steps, "log_history": history}


def run(_: str) -> None:
    """Train with the options of the command line."""
    train()
