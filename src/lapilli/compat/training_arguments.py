"""The options of the original's training program: names, defaults, and how their texts are read."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar, get_args, get_origin

from lapilli.errors import ConfigError, UnsupportedModelError

Value = TypeVar("Value")

# Options of the Hugging Face trainer that published scripts pass and that change nothing here.
IGNORED = frozenset(
    {
        "bf16_full_eval",
        "cache_dir",
        "dataloader_num_workers",
        "ddp_find_unused_parameters",
        "deepspeed",
        "double_quant",
        "eval_steps",
        "evaluation_strategy",
        "fp16",
        "gradient_checkpointing",
        "lazy_preprocess",
        "local_rank",
        "logging_steps",
        "mpt_attn_impl",
        "optim",
        "per_device_eval_batch_size",
        "quant_type",
        "remove_unused_columns",
        "report_to",
        "run_name",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "tf32",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingArguments:
    """Options of llava/train/train.py with its defaults.

    Raises:
        ConfigError: no base model, data or output folder.
        UnsupportedModelError: quantized training.
    """

    model_name_or_path: str = ""
    version: str = "v0"
    freeze_backbone: bool = False
    tune_mm_mlp_adapter: bool = False
    vision_tower: str = ""
    mm_vision_select_layer: int = -1
    pretrain_mm_mlp_adapter: str = ""
    mm_projector_type: str = "linear"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    mm_patch_merge_type: str = "flat"
    mm_vision_select_feature: str = "patch"
    data_path: str = ""
    is_multimodal: bool = False
    image_folder: str = ""
    image_aspect_ratio: str = "square"
    freeze_mm_mlp_adapter: bool = False
    model_max_length: int = 512
    bits: int = 16
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_weight_path: str = ""
    lora_bias: str = "none"
    mm_projector_lr: float | None = None
    group_by_modality_length: bool = False
    output_dir: str = ""
    bf16: bool = False
    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "data_path", "output_dir", "vision_tower"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing: the training program needs it")
        if self.bits != 16:
            raise UnsupportedModelError(f"--bits {self.bits}: only 16 is there, without quantizing")
        if self.lora_enable and self.lora_bias != "none":
            raise UnsupportedModelError(f"--lora_bias {self.lora_bias}: only none is there")


def parse_arguments(arguments: Sequence[str]) -> TrainingArguments:
    """Options written as `--name value` or, for a switch, `--name` alone.

    Raises:
        ConfigError: an unknown option, or a value that is none of its option.
    """
    known = {field.name: field.type for field in fields(TrainingArguments)}
    given: dict[str, object] = {}
    at = 0
    while at < len(arguments):
        name, equals, text = arguments[at].removeprefix("--").partition("=")
        is_option = arguments[at].startswith("--") and name in known.keys() | IGNORED
        if not is_option:
            raise ConfigError(f"unknown training option {arguments[at]!r}")
        if not equals and at + 1 < len(arguments) and not arguments[at + 1].startswith("--"):
            at += 1
            text = arguments[at]
        if name in known:
            given[name] = _read(name, text or "True", known[name])
        at += 1
    return TrainingArguments(**given)  # type: ignore[arg-type]  # _read made them of these types


def _read(name: str, text: str, kind: object) -> object:
    try:
        return _convert(text, kind)
    except ValueError as error:
        raise ConfigError(f"--{name} {text}: {error}") from error


def _convert(text: str, kind: object) -> object:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("expected True or False")
        return text.lower() in ("true", "1", "yes")
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"expected one of {', '.join(get_args(kind))}")
        return text
    if kind is int:
        return int(text)
    if kind in (float, float | None):
        return None if text == "None" else float(text)
    return "" if text == "None" else text
