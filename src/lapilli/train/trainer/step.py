"""One optimizer step over the micro-batches of all processes; knows no files and no schedule.

    sum of a micro-batch x scale -> backward, all of them -> gradients summed -> clip -> update

The device is waited for once, when everything has been asked of it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from lapilli.train.attention import PlainAttention
from lapilli.train.distributed import Team
from lapilli.train.recipe import TrainerRecipe
from lapilli.train.trainer.contract import Loss, SkippingBatch, Task
from lapilli.train.trainer.loss import scales

Made = Mapping[int, tuple[Any, int]]


class NotFiniteError(ArithmeticError):
    """A loss or a gradient that is infinite or not a number; the weights are as they were.

    Attributes:
        what: "loss" or "gradient norm".
        value: of it.
        batches: (micro, batch) of this process that made it.
    """

    def __init__(self, what: str, value: float, batches: list[tuple[int, Any]]) -> None:
        super().__init__(f"{what} is {value}")
        self.what, self.value, self.batches = what, value, batches


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step did.

    Attributes:
        figures: loss and its parts per supervised thing, the gradients' norm.
        count: supervised things in all processes.
        skipped: samples that could not be read, in all processes.
        stop: whether a process was asked to end.
    """

    figures: dict[str, float]
    count: int
    skipped: int
    stop: bool


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a step stands in its run.

    Attributes:
        step: counted from 0.
        team: this process among all.
        asked_to_stop: whether this process should end.
    """

    step: int
    team: Team
    asked_to_stop: Callable[[], bool]


def take_step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    recipe: TrainerRecipe,
    made: Made,
    *,
    at: Moment,
) -> StepRecord:
    """Learn from the micro-batches `made` (by their number) of this process.

    What torch draws meanwhile (dropout) is a function of the seed, the step and the micro-batch.

    Raises:
        NotFiniteError: in every process at once.
    """
    run, team = recipe.run, at.team
    counts = [made[m][1] if m in made else 0 for m in range(run.accumulate)]
    counts = team.sum_counts(counts)
    weights = scales(counts, run.reduction)
    losses: list[Loss] = []
    for micro, (batch, _) in made.items():
        torch.manual_seed(random_seed(run.seed, at.step, micro))
        with _attention(task.model, recipe):
            with precision(task.model, recipe):
                loss = task.loss(batch)
            (loss.total * (weights[micro] * team.loss_scale)).backward()  # type: ignore[no-untyped-call]  # torch's own
        losses.append(Loss(loss.total.detach(), loss.parts))
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    team.sum_gradients(trainable)
    norm = team.clip(trainable, recipe.optim.clip)
    figures = _weighted(losses, [weights[micro] for micro in made])
    beside = {"stop": float(at.asked_to_stop()), "skipped": float(_num_skipped(made))}
    figures = team.sum_floats({**figures, **beside})
    asked, skipped = figures.pop("stop") > 0, int(figures.pop("skipped"))
    _check_finite(figures, norm, losses, made)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepRecord({**figures, "norm": norm}, sum(counts), skipped, asked)


def _num_skipped(made: Made) -> int:
    batches = (batch for batch, _ in made.values())
    return sum(len(batch.skipped) for batch in batches if isinstance(batch, SkippingBatch))


def random_seed(seed: int, step: int, micro: int) -> int:
    """One number for what is drawn while a micro-batch is learned from."""
    made = np.random.SeedSequence([seed, step, micro, 37]).generate_state(1, np.uint64)
    return int(made[0] >> np.uint64(1))


def precision(model: nn.Module, recipe: TrainerRecipe) -> torch.autocast:
    """What forward passes are computed in; weights keep their own."""
    enabled = recipe.run.precision == "bfloat16"
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=enabled)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes."""
    return next(model.parameters()).device


def _attention(model: nn.Module, recipe: TrainerRecipe) -> AbstractContextManager[object]:
    """On a CPU attention that is fast backwards.

    Not with gradient checkpointing: torch leaves the mode before it runs a backward pass, so that
    layers would be computed again in another way than the first time.
    """
    is_plain = device_of(model).type == "cpu" and not recipe.run.gradient_checkpointing
    return PlainAttention() if is_plain else nullcontext()


def _weighted(losses: Sequence[Loss], weights: Sequence[float]) -> dict[str, float]:
    """Loss and parts per supervised thing, summed in double precision on the host."""
    figures = {"loss": 0.0}
    for loss, weight in zip(losses, weights, strict=True):
        figures["loss"] += float(loss.total) * weight
        for name, part in loss.parts.items():
            figures[name] = figures.get(name, 0.0) + float(part) * weight
    return figures


def _check_finite(
    figures: Mapping[str, float], norm: float, losses: Sequence[Loss], made: Made
) -> None:
    """Stop before the update; every process sees the same sums."""
    if not isfinite(figures["loss"]):
        bad = [(m, made[m][0]) for m, loss in zip(made, losses, strict=True) if _bad(loss)]
        raise NotFiniteError("loss", figures["loss"], bad)
    if not isfinite(norm):
        raise NotFiniteError("gradient norm", norm, [(m, batch) for m, (batch, _) in made.items()])


def _bad(loss: Loss) -> bool:
    return not isfinite(float(loss.total))
