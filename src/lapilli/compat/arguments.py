"""Options of the original's training program, and the recipe of lapilli that says the same."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.prompt.template import DEFAULT_TEMPLATE, TEMPLATES
from lapilli.train.distributed import rank_info_of
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)

SCHEDULES = {
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
    parser: Any = _Parser(kinds)
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
            # The recipe checks it; the table cannot say that its values are names of schedules.
            schedule=SCHEDULES[training.lr_scheduler_type],  # type: ignore[arg-type]
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
