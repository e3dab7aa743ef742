"""The training program of the original (llava.train.train), over our loading and schedule.

python -m lapilli.compat -m llava.train.train --model_name_or_path BASE --vision_tower CLIP ...
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lapilli.compat import conversation
from lapilli.compat.foreign import Foreign
from lapilli.compat.models import LlavaForCausalLM
from lapilli.compat.tokenizer import PreTrainedTokenizer
from lapilli.compat.training_arguments import TrainingArguments, parse_arguments
from lapilli.compat.training_data import (
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    preprocess,
    preprocess_multimodal,
)
from lapilli.compat.training_files import WRAPPER, save_results
from lapilli.compat.training_model import Initial, add_lora, build_model, choose_trainable
from lapilli.train.data.order import grouped_by_modality
from lapilli.train.recipe import OptimRecipe
from lapilli.train.trainer.optim import lr_share, set_lr

__all__ = [
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "Trained",
    "preprocess",
    "preprocess_multimodal",
    "train",
]


@dataclass(slots=True)
class Trained:
    """What a run did.

    Attributes:
        losses: per step, before its update.
        learning_rates: of the first group, after each step.
        optimizer_groups: weight_decay, lr, n and names of each, as the original's names.
        batch_shapes: of the first batch.
    """

    optimizer_groups: list[dict[str, Any]]
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    batch_shapes: dict[str, list[int]] = field(default_factory=dict)


def train(
    attn_implementation: str | None = None,
    *,
    arguments: Sequence[str] | None = None,
    initial: Initial | None = None,
) -> Trained:
    """Train as `arguments` say and write the results to their output_dir.

    Args:
        attn_implementation: taken and not needed: torch chooses the kernel.
        arguments: options; None: those of the command line.
        initial: parameters to start from in place of random ones, by their original names.

    Raises:
        ConfigError: an option that is unknown or missing.
        NotImplementedError: start and end tokens with tune_mm_mlp_adapter (quirk 17).
    """
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    torch.manual_seed(options.seed)
    tokenizer, model, processor, _ = build_model(options, initial or {})
    prepare_tokenizer(tokenizer, options)
    if options.lora_enable:
        add_lora(model, options, initial or {})
    choose_trainable(model, options)
    data = LazySupervisedDataset(options.data_path, tokenizer, _data_arguments(options, processor))
    trained = _run(model, data, DataCollatorForSupervisedDataset(tokenizer), options)
    save_results(model, tokenizer, options, _state(trained))
    return trained


def prepare_tokenizer(tokenizer: PreTrainedTokenizer, options: TrainingArguments) -> None:
    """Pad token, length and template; the template is a global of the conversation module.

    Note: unknown versions take vicuna_v1 without a word, as in the original.
    """
    tokenizer.model_max_length = options.model_max_length
    tokenizer.padding_side = "right"
    if options.version != "v0" or tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    if options.version not in ("v0", "v0.5"):
        templates = conversation.conv_templates
        chosen = templates.get(options.version, templates["vicuna_v1"])
        conversation.default_conversation = chosen


@dataclass(frozen=True, slots=True)
class _DataArguments:
    """What the dataset of the original reads from its `data_args`."""

    image_folder: str
    image_processor: Any
    image_aspect_ratio: str
    mm_use_im_start_end: bool
    is_multimodal: bool = True


def _data_arguments(options: TrainingArguments, processor: Foreign) -> _DataArguments:
    return _DataArguments(
        options.image_folder, processor, options.image_aspect_ratio, options.mm_use_im_start_end
    )


def _run(
    model: LlavaForCausalLM,
    data: LazySupervisedDataset,
    collate: DataCollatorForSupervisedDataset,
    options: TrainingArguments,
) -> Trained:
    """The steps: mean loss of each micro-batch, clipped, AdamW, schedule."""
    steps = _num_steps(len(data), options)
    recipe = _recipe(options, steps)
    optimizer, groups = build_optimizer(model, options)
    trained = Trained(groups)
    batches = _batches(data, options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step in range(steps):
        set_lr(optimizer, lr_share(step, steps, recipe))
        loss = 0.0
        for _ in range(options.gradient_accumulation_steps):
            batch = collate([data[i] for i in next(batches)])
            trained.batch_shapes = trained.batch_shapes or _shapes(batch)
            part = model(**_to(batch, model)).loss / options.gradient_accumulation_steps
            part.backward()
            loss += float(part.detach())
        nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained.losses.append(loss)
        trained.learning_rates.append(options.learning_rate * lr_share(step + 1, steps, recipe))
    model.eval()
    return trained


def _num_steps(samples: int, options: TrainingArguments) -> int:
    if options.max_steps > 0:
        return options.max_steps
    per_step = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return max(math.ceil(options.num_train_epochs * max(samples // per_step, 1)), 1)


def _recipe(options: TrainingArguments, steps: int) -> OptimRecipe:
    return OptimRecipe(
        lr=options.learning_rate,
        schedule=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps or math.ceil(steps * options.warmup_ratio),
    )


def build_optimizer(
    model: LlavaForCausalLM, options: TrainingArguments
) -> tuple[torch.optim.AdamW, list[dict[str, Any]]]:
    """AdamW with the original's groups, and a description of them.

    Two groups, with and without weight decay (norms and biases); two more for the projector when
    it has a learning rate of its own.

    Source: LLaVA llava_trainer.py create_optimizer.
    """
    rates = {False: options.learning_rate}
    if options.mm_projector_lr is not None:
        rates[True] = options.mm_projector_lr
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = undecayed_names(model)
    groups: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    for for_projector, lr in rates.items():
        for decayed in (True, False):
            chosen = [
                (name, p)
                for name, p in named
                if (name not in undecayed) == decayed
                and ("mm_projector" in name and True in rates) == for_projector
            ]
            decay = options.weight_decay if decayed else 0.0
            setting = {"weight_decay": decay, "lr": lr}
            groups.append({"params": [p for _, p in chosen], "base_lr": lr, **setting})
            names = sorted(_original_name(name, options) for name, _ in chosen)
            described.append({**setting, "n": len(names), "names": names})
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
    )
    return optimizer, described


def undecayed_names(model: nn.Module) -> set[str]:
    """Parameters without weight decay: biases, and what belongs to a norm."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if "bias" in name or "Norm" in type(module).__name__
    }


def _original_name(name: str, options: TrainingArguments) -> str:
    """The name that a parameter has inside of the original's wrapper."""
    if not options.lora_enable:
        return name
    for half in ("lora_A", "lora_B"):
        name = name.replace(f".{half}.weight", f".{half}.default.weight")
    return WRAPPER + name


def _batches(data: LazySupervisedDataset, options: TrainingArguments) -> Iterator[list[int]]:
    """Sample numbers of one micro-batch after the other, epoch after epoch."""
    size = options.per_device_train_batch_size
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        if options.group_by_modality_length:
            grouped = size * options.gradient_accumulation_steps
            order = grouped_by_modality(data.modality_lengths, grouped, 1, generator)
        else:
            order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield order[start : start + size]


def _shapes(batch: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in batch.items() if torch.is_tensor(value)}


def _to(batch: Mapping[str, Any], model: LlavaForCausalLM) -> dict[str, Any]:
    return {name: v.to(model.device) if torch.is_tensor(v) else v for name, v in batch.items()}


def _state(trained: Trained) -> dict[str, Any]:
    """trainer_state.json: what was logged."""
    pairs = zip(trained.losses, trained.learning_rates, strict=True)
    history = [
        {"step": step, "loss": loss, "learning_rate": lr}
        for step, (loss, lr) in enumerate(pairs, start=1)
    ]
    return {"global_step": len(history), "max_steps": len(history), "log_history": history}


if __name__ == "__main__":
    train()
