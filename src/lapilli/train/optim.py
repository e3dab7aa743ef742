"""AdamW with its parameter groups, and the learning rate of every step."""

import math

import torch
from torch import nn

from lapilli.train.recipe import OptimRecipe


def parameter_groups(model: nn.Module, recipe: OptimRecipe) -> list[dict[str, object]]:
    """Trainable parameters by learning rate, with and without weight decay.

    Norms and biases (one axis) are never decayed. A parameter belongs to the projector or to the
    tower when its name
    says so. `base_lr` is the peak of a group; the schedule scales it.

    Source: LLaVA llava_trainer.py create_optimizer.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((peak_lr(name, recipe), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def peak_lr(name: str, recipe: OptimRecipe) -> float:
    """Learning rate after the warm-up of the parameter of this name."""
    if "projector" in name and recipe.projector_lr is not None:
        return recipe.projector_lr
    if "vision_tower" in name and recipe.tower_lr is not None:
        return recipe.tower_lr
    return recipe.lr


def build_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over the trainable parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, recipe),
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,
    )


def lr_share(step: int, steps: int, recipe: OptimRecipe) -> float:
    """Part of the peak learning rate at a step (counted from 0): warm-up, then the schedule.

    Source: Hugging Face get_cosine_schedule_with_warmup and its siblings; `trapezoid` is
        constant, then linear.
    """
    if step < recipe.warmup_steps:
        return step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(steps - recipe.warmup_steps, 1)
    match recipe.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "trapezoid":
            share = min((1.0 - step / steps) / max(recipe.decay_share, 1e-9), 1.0)
    return recipe.final_share + (1.0 - recipe.final_share) * max(share, 0.0)


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Every group's learning rate as a part of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share
