"""One training run, logged, saved and resumable to the bit; knows no data and no model.

    task.batch(step, i) -> batch          a function of the seed, the step and the micro-batch alone
    task.loss(batch)    -> sum, count     the loop divides by what the whole step supervises
    folder/state.pt                       weights, moments, step: written aside, then renamed

The order of samples being a function of the step, a run that is killed and started again makes the
same weights.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lapilli.errors import LapilliError
from lapilli.train.attention import PlainAttention
from lapilli.train.log import RunLog
from lapilli.train.loss import scales
from lapilli.train.optim import build_optimizer, lr_share, set_lr
from lapilli.train.parallel import ALONE, Team
from lapilli.train.recipe import Recipe


class TrainingError(LapilliError, RuntimeError):
    """A run that cannot go on."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Loss of one micro-batch: a sum over what counts, and parts of it for the log."""

    total: torch.Tensor
    parts: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """What is trained on what."""

    @property
    def model(self) -> nn.Module:
        """Trainable parameters are those that require a gradient."""
        ...

    def batch(self, step: int, micro: int) -> tuple[Any, int]:
        """A micro-batch and how many supervised things it has."""
        ...

    def loss(self, batch: Any) -> Loss:  # noqa: ANN401  the task's own type
        """The summed loss."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Figures on held-out data."""
        ...


def train(
    task: Task, recipe: Recipe, folder: Path, *, team: Team = ALONE, echo: bool = False
) -> None:
    """Run the recipe to its last step, from the checkpoint in `folder` when there is one.

    Raises:
        TrainingError: the loss is not finite; the batch is kept in `folder/bad_batch.pt`.
    """
    run = recipe.run
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    optimizer = build_optimizer(task.model, recipe.optim)
    log = RunLog(folder, echo=echo)
    first = resume(task.model, optimizer, folder)
    if team.leads:
        log.rewind(first)
    seen, started = 0.0, time.monotonic()
    for step in range(first, run.steps):
        record = _step(task, optimizer, recipe, step, team=team, folder=folder)
        seen += record.pop("count")
        done = step + 1
        last = done == run.steps
        if not team.leads:
            continue
        if done % run.log_every == 0 or last:
            speed = seen / (time.monotonic() - started)
            log.write({"step": done, **record, "per_s": round(speed, 1)})
            seen, started = 0.0, time.monotonic()
        if done % run.save_every == 0 or last:
            save(task.model, optimizer, done, folder)
        if run.evaluate_every and (done % run.evaluate_every == 0 or last):
            log.write({"step": done, **evaluate(task, recipe)})


def _step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    step: int,
    *,
    team: Team,
    folder: Path,
) -> dict[str, float]:
    """One optimizer step; the loss and its parts per supervised thing."""
    run = recipe.run
    micro_batches = {micro: task.batch(step, micro) for micro in team.own(run.accumulate)}
    counts = [micro_batches[m][1] if m in micro_batches else 0 for m in range(run.accumulate)]
    counts = team.sum_counts(counts)
    weights = scales(counts, run.reduction)
    record: dict[str, float] = {"loss": 0.0}
    for micro, (batch, _) in micro_batches.items():
        with PlainAttention(), _precision(recipe):
            loss = task.loss(batch)
        if not torch.isfinite(loss.total):
            torch.save(batch, folder / "bad_batch.pt")
            raise TrainingError(
                f"the loss of step {step + 1} is {loss.total.item()}: its batch is in "
                f"{folder / 'bad_batch.pt'}; lower optim.lr or check that data"
            )
        (loss.total * weights[micro]).backward()  # type: ignore[no-untyped-call]  # torch's own
        record["loss"] += float(loss.total.detach()) * weights[micro]
        for name, part in loss.parts.items():
            record[name] = record.get(name, 0.0) + part * weights[micro]
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    team.sum_gradients(trainable)
    norm = nn.utils.clip_grad_norm_(trainable, recipe.optim.clip)
    share = lr_share(step, run.steps, recipe.optim)
    set_lr(optimizer, share)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    record = team.sum_floats(record)
    return {**record, "norm": float(norm), "lr": recipe.optim.lr * share, "count": sum(counts)}


def _precision(recipe: Recipe) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.run.precision == "bfloat16")


def evaluate(task: Task, recipe: Recipe) -> Mapping[str, float]:
    """The task's figures with the model in evaluation mode."""
    task.model.eval()
    try:
        with torch.no_grad(), _precision(recipe):
            return task.evaluate()
    finally:
        task.model.train()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    """Everything that the next step needs; a kill while writing leaves the earlier file whole."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"step": step, "model": trained, "optimizer": optimizer.state_dict()}
    staged = folder / "state.part"
    torch.save(state, staged)
    staged.replace(folder / "state.pt")


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """The step to go on from: 0 without a checkpoint."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in state["model"].items():
            parameters[name].copy_(value)
    peaks = [group["base_lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["base_lr"] = peak  # the recipe's, should it have changed
    return int(state["step"])
