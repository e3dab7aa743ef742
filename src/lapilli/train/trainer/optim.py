"""Optimizer with its parameter groups, the learning-rate schedule, and averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lapilli.train.recipe import OptimRecipe


def parameter_groups(model: nn.Module, recipe: OptimRecipe) -> list[dict[str, object]]:
    """Return the trainable parameters by learning rate, with and without weight decay.

    A parameter belongs to the projector or to the tower when its name says so. `base_lr` is the
    peak of a group; the schedule scales it.

    Source: LLaVA llava_trainer.py create_optimizer.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:  # seen: tied weights
                continue
            seen.add(parameter)
            decay = recipe.weight_decay if decays(module, name, parameter, recipe) else 0.0
            key = (peak_lr(f"{path}.{name}", recipe), decay)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def decays(module: nn.Module, name: str, parameter: nn.Parameter, recipe: OptimRecipe) -> bool:
    """Return whether weight decay pulls at this parameter of `module`.

    "original": all but biases and what norms have; "matrices": what has two axes or more.

    Source: Hugging Face trainer_pt_utils.get_parameter_names, with which the original makes its
        groups.
    Note: there the gains of Mistral's norms decay, for want of an entry in a list; here no norm's.
    """
    if recipe.decay == "matrices":
        return parameter.dim() > 1
    return "bias" not in name and "Norm" not in type(module).__name__


def peak_lr(name: str, recipe: OptimRecipe) -> float:
    """Return the learning rate after the warm-up of the parameter of this name."""
    if "projector" in name and recipe.projector_lr is not None:
        return recipe.projector_lr
    if "vision_tower" in name and recipe.tower_lr is not None:
        return recipe.tower_lr
    return recipe.lr


def build_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters; one kernel for a group's tensors."""
    groups = parameter_groups(model, recipe)
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def warmup_steps(steps: int, recipe: OptimRecipe) -> int:
    """Return the steps of linear growth: as given, else a share of all, rounded up.

    Source: Hugging Face TrainingArguments.get_warmup_steps.
    """
    return recipe.warmup_steps or math.ceil(steps * recipe.warmup_ratio)


def lr_share(step: int, steps: int, recipe: OptimRecipe) -> float:
    """Return the part of the peak learning rate at a step (counted from 0): warm-up, then schedule.

    Source: Hugging Face get_cosine_schedule_with_warmup and its siblings; `trapezoid` is
        constant, then linear.
    """
    warmup = warmup_steps(steps, recipe)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    match recipe.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "trapezoid":
            share = min((1.0 - step / steps) / max(recipe.decay_share, 1e-9), 1.0)
    return recipe.min_lr_ratio + (1.0 - recipe.min_lr_ratio) * max(share, 0.0)


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to a part of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share


_FIRST_STEPS = 10  # how slowly the average begins to look back


class Average:
    """An exponential moving average of a model's trainable parameters, in float32.

    At step s (counted from 1) it keeps min(decay, (1 + s) / (10 + s)) of itself: a short run is
    not held at the weights it began with, and a resumed run goes on exactly.

    Source: Polyak & Juditsky 1992; the growing decay is TensorFlow's ExponentialMovingAverage
        with num_updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.tensors: dict[str, torch.Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    def update(self, step: int) -> None:
        """Take in the weights after this many steps."""
        keep = min(self._decay, (1 + step) / (_FIRST_STEPS + step))
        with torch.no_grad():
            now = [p.detach().float() for p in self._parameters.values()]
            torch._foreach_lerp_(list(self.tensors.values()), now, 1.0 - keep)

    def put_into_model(self) -> None:
        """Copy the averages over the model's weights."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averages inside, and its own weights again afterwards, bit by bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.put_into_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])
