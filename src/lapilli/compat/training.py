"""Training program of the original (llava.train.train): its options as a recipe for lapilli.

    options --recipe_of--> Recipe --launch--> output_dir/.lapilli --save--> the original's files

python -m lapilli.compat -m llava.train.train --model_name_or_path BASE --vision_tower CLIP ...

Steps, data and state are lapilli.train's. A run that was killed goes on with the same command.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NoReturn

import torch
from transformers import HfArgumentParser

from lapilli.checkpoint.source import RESULTS, read_json, resolve
from lapilli.checkpoint.write.files import write_json
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
from lapilli.config.llava import RECORD_KEY
from lapilli.errors import CheckpointError, ConfigError, UnsupportedModelError
from lapilli.prompt.template import DEFAULT_TEMPLATE, TEMPLATES
from lapilli.train.distributed import joined, rank_info_of
from lapilli.train.launch import LaunchedTask, launch
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    Schedule,
    SourceRecipe,
)
from lapilli.train.trainer.loop import number_of_steps
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.optim import lr_share

SCHEDULES: Final[Mapping[str, Schedule]] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


@dataclass(kw_only=True)
class ModelArguments:
    """Options of the model, with the original's defaults."""

    model_name_or_path: str = "facebook/opt-125m"
    version: str = "v0"
    freeze_backbone: bool = False
    tune_mm_mlp_adapter: bool = False
    vision_tower: str | None = None
    mm_vision_select_layer: int = -1
    pretrain_mm_mlp_adapter: str | None = None
    mm_projector_type: str = "linear"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    mm_patch_merge_type: str = "flat"
    mm_vision_select_feature: str = "patch"


@dataclass(kw_only=True)
class DataArguments:
    """Options of the data."""

    data_path: str | None = None
    lazy_preprocess: bool = False
    is_multimodal: bool = False
    image_folder: str | None = None
    image_aspect_ratio: str = "square"


@dataclass(kw_only=True)
class TrainingArguments:
    """Options of training: the original's, and those of transformers that scripts give.

    Attributes:
        deepspeed: a file named zero3 shares weights and moments among the processes, as FSDP.
        lazy_preprocess, tf32, run_name, ...: say nothing about the result and are not read.
    """

    output_dir: str = ""
    cache_dir: str | None = None
    optim: str = "adamw_torch"
    remove_unused_columns: bool = False
    freeze_mm_mlp_adapter: bool = False
    mpt_attn_impl: str | None = "triton"
    model_max_length: int = 512
    double_quant: bool = True
    quant_type: str = "nf4"
    bits: int = 16
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_weight_path: str = ""
    lora_bias: str = "none"
    mm_projector_lr: float | None = None
    group_by_modality_length: bool = False
    bf16: bool = False
    fp16: bool = False
    tf32: bool | None = None
    bf16_full_eval: bool = False
    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    lr_scheduler_type: str = "linear"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42
    save_steps: int = 500
    save_strategy: str = "steps"
    save_total_limit: int | None = None
    logging_steps: int = 500
    evaluation_strategy: str = "no"
    eval_steps: int | None = None
    dataloader_num_workers: int = 0
    ddp_find_unused_parameters: bool | None = None
    deepspeed: str | None = None
    local_rank: int = -1
    report_to: str = "none"
    run_name: str | None = None


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


class _Parser(HfArgumentParser):
    """Parser of transformers with an error that can be caught."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"training options: {message}")


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Read options written as `--name value`, `--name=value` or, for a switch, `--name` alone.

    Raises:
        ConfigError: an unknown option, a value that is none of its option, or one that is missing.
        UnsupportedModelError: a way of training that lapilli does not have.
    """
    kinds: Any = (ModelArguments, DataArguments, TrainingArguments)
    types = {field: field.type for kind in kinds for field in fields(kind)}
    parser: Any = _Parser(kinds)
    for field, kind in types.items():  # transformers 5.2 takes `| None` out of them
        field.type = kind
    model, data, training, unknown = parser.parse_args_into_dataclasses(
        args=list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ConfigError(f"unknown training option {unknown[0]!r}")
    given = {**vars(model), **vars(data), **vars(training)}
    for name in ("model_name_or_path", "data_path", "output_dir", "vision_tower"):
        if given[name] in (None, "", "None"):
            raise ConfigError(f"--{name} is missing: the training program needs it")
    allowed = {
        "bits": (16, 4) if training.lora_enable else (16,),
        "lora_bias": ("none",),
        "fp16": (False,),
        "optim": ("adamw_torch", "adamw_torch_fused", "adamw_hf"),
        "lr_scheduler_type": tuple(SCHEDULES),
    }
    for name, values in allowed.items():
        if given[name] not in values:
            raise UnsupportedModelError(
                f"--{name} {given[name]}: lapilli trains with {' or '.join(map(str, values))} only"
            )
    return model, data, training


def recipe_of(parsed: Arguments, start: Path, config: Mapping[str, Any]) -> Recipe:
    """Return the recipe that says what the options say.

    Source: LLaVA train.py: the tower rests; with a LoRA the adapters and the projector are trained,
        with tune_mm_mlp_adapter the projector, with freeze_backbone all but the stack under the
        head.
    """
    model, data, training = parsed
    stack = "transformer" if config["model_type"] == "llava_mpt" else "model"
    frozen = {
        f"language_model.{stack}.": model.freeze_backbone and not training.lora_enable,
        "modalities.image.projector.": training.freeze_mm_mlp_adapter,
    }
    lora = LoraRecipe(
        rank=training.lora_r,
        alpha=float(training.lora_alpha),
        dropout=training.lora_dropout,
        base="nf4" if training.bits == 4 else "float",
        double_quant=training.bits == 4 and training.double_quant,
    )
    rank_info = rank_info_of(os.environ)
    num_processes = 1 if rank_info is None else rank_info.size
    reports = training.report_to.replace("all", "tensorboard,wandb").split(",")
    return Recipe(
        stage="align" if model.tune_mm_mlp_adapter else "instruct",
        model=ModelRecipe(
            checkpoint=str(start), freeze=tuple(name for name, rests in frozen.items() if rests)
        ),
        optim=OptimRecipe(
            lr=training.learning_rate,
            projector_lr=training.mm_projector_lr,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
            schedule=SCHEDULES[training.lr_scheduler_type],
            warmup_steps=training.warmup_steps,
            warmup_ratio=training.warmup_ratio,
            max_grad_norm=training.max_grad_norm,
        ),
        run=RunRecipe(
            batch_size=training.per_device_train_batch_size,
            steps=max(training.max_steps, 0),
            epochs=training.num_train_epochs,
            gradient_accumulation_steps=training.gradient_accumulation_steps * num_processes,
            precision="bfloat16" if training.bf16 else "float32",
            reduction="llava",
            seed=training.seed,
            log_every=1,
            save_every=training.save_steps,
            gradient_checkpointing=training.gradient_checkpointing,
            sharding="fsdp" if "zero3" in (training.deepspeed or "") else "ddp",
            workers=training.dataloader_num_workers,
            loggers=tuple(name for name in ("tensorboard", "wandb") if name in reports),
            plot=False,
        ),
        data=DataRecipe(
            sources=(SourceRecipe(path=str(data.data_path), images=data.image_folder),),
            template=template_of(model.version),
            max_length=training.model_max_length,
            group="modality" if training.group_by_modality_length else "none",
        ),
        lora=lora if training.lora_enable else None,
    )


def template_of(version: str) -> str:
    """Return the name of the conversation template of a `--version`.

    Source: LLaVA train.py: v0 and v0.5 leave the default, and unknown names take it without a word.
    """
    return version if version in TEMPLATES and version not in ("v0", "v0.5") else DEFAULT_TEMPLATE


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

    `attn_implementation` is not needed: torch chooses the kernel. `arguments` are those of the
    command line where they are None.

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


def _save(task: LaunchedTask, parsed: Arguments, config: dict[str, Any], folder: Path) -> None:
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
        loaded = replace(task.loaded, model=task.loaded.model.to("cpu"))
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


def _state(task: LaunchedTask, folder: Path) -> dict[str, Any]:
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
