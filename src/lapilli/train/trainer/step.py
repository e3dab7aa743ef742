"""Training step: one optimizer step over the micro-batches of all processes; knows no schedule.

    sum of a micro-batch x scale -> backward, all of them -> gradients summed -> clip -> update

    loss / all supervised positions of a step   "tokens": every token weighs the same
    mean of the means of the micro-batches      "llava": as in the original's trainer

The device is waited for once, when everything has been asked of it. A step whose loss or gradient
is not finite changes nothing, and its batch is kept so that one can look at it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit
from torch.overrides import TorchFunctionMode

from lapilli.errors import ConfigError
from lapilli.shapes import Float, Tensor
from lapilli.train.distributed import SINGLE_PROCESS, ParallelContext
from lapilli.train.recipe import Reduction, TrainerRecipe
from lapilli.train.trainer.state_file import write_whole
from lapilli.train.trainer.task import Loss, Task, TrainingError

Made = Mapping[int, tuple[Any, int]]


class NotFiniteError(ArithmeticError):
    """A loss or a gradient that is infinite or not a number; the weights are as they were.

    Attributes:
        what: "loss" or "gradient norm".
        batches: (micro, batch) of this process that made it.
    """

    def __init__(self, what: str, value: float, batches: list[tuple[int, Any]]) -> None:
        super().__init__(f"{what} is {value}")
        self.what, self.value, self.batches = what, value, batches


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The outcome of a step.

    Attributes:
        metrics: loss and its parts per supervised thing, the gradients' norm.
        count: supervised things in all processes.
        skipped: samples that could not be read, in all processes.
        stop: whether a process was asked to end.
    """

    metrics: dict[str, float]
    count: int
    skipped: int
    stop: bool


def take_step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    recipe: TrainerRecipe,
    made: Made,
    *,
    step: int,
    parallel: ParallelContext = SINGLE_PROCESS,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> StepRecord:
    """Learn from the micro-batches `made` (by their number) of this process.

    What torch draws meanwhile (dropout) is a function of the seed, the step and the micro-batch.
    Whether the run should stop is asked after the backward pass.

    Raises:
        NotFiniteError: in every process at once.
    """
    run = recipe.run
    counts = [made[m][1] if m in made else 0 for m in range(run.gradient_accumulation_steps)]
    counts = parallel.sum_counts(counts)
    weights = scales(counts, run.reduction)
    losses: list[Loss] = []
    for micro, (batch, _) in made.items():
        torch.manual_seed(random_seed(run.seed, step, micro))
        with _attention(task.model, recipe):
            with precision(task.model, recipe):
                loss = task.loss(batch)
            (loss.total * (weights[micro] * parallel.loss_scale)).backward()  # type: ignore[no-untyped-call]  # torch's own
        losses.append(Loss(loss.total.detach(), loss.parts))
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.sum_gradients(trainable)
    norm = parallel.clip(trainable, recipe.optim.max_grad_norm)
    metrics = _weighted(losses, [weights[micro] for micro in made])
    skipped = sum(len(getattr(batch, "skipped", ())) for batch, _ in made.values())
    beside = {"stop": float(asked_to_stop()), "skipped": float(skipped)}
    metrics = parallel.sum_floats({**metrics, **beside})
    asked, skipped = metrics.pop("stop") > 0, int(metrics.pop("skipped"))
    _check_finite(metrics, norm, losses, made)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepRecord({**metrics, "norm": norm}, sum(counts), skipped, asked)


def scales(counts: list[int], reduction: Reduction) -> list[float]:
    """Return the factors of the micro-batches' sums that make the step's loss their total.

    Raises:
        ConfigError: nothing is supervised, or (llava) one micro-batch has nothing.
    """
    total = sum(counts)
    if total == 0 or (reduction == "llava" and 0 in counts):
        raise ConfigError(
            f"no supervised token among {len(counts)} micro-batches with {counts}: "
            "check the loss mask of the data"
        )
    if reduction == "tokens":
        return [1.0 / total] * len(counts)
    return [1.0 / (count * len(counts)) for count in counts]


def random_seed(seed: int, step: int, micro: int) -> int:
    """Return one number for what is drawn while a micro-batch is learned from."""
    made = np.random.SeedSequence([seed, step, micro, 37]).generate_state(1, np.uint64)
    return int(made[0] >> np.uint64(1))


def precision(model: nn.Module, recipe: TrainerRecipe) -> torch.autocast:
    """Return the autocast of forward passes; weights keep their own dtype."""
    enabled = recipe.run.precision == "bfloat16"
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=enabled)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model computes."""
    return next(model.parameters()).device


def _attention(model: nn.Module, recipe: TrainerRecipe) -> AbstractContextManager[object]:
    """Return the mode in which attention is fast backwards on a CPU.

    Not with gradient checkpointing: torch leaves the mode before it runs a backward pass, so that
    layers would be computed again in another way than the first time.
    """
    is_plain = device_of(model).type == "cpu" and not recipe.run.gradient_checkpointing
    return PlainAttention() if is_plain else nullcontext()


def _weighted(losses: Sequence[Loss], weights: Sequence[float]) -> dict[str, float]:
    """Return loss and parts per supervised thing, summed in double precision on the host."""
    metrics = {"loss": 0.0}
    for loss, weight in zip(losses, weights, strict=True):
        metrics["loss"] += float(loss.total) * weight
        for name, part in loss.parts.items():
            metrics[name] = metrics.get(name, 0.0) + float(part) * weight
    return metrics


def _check_finite(
    metrics: Mapping[str, float], norm: float, losses: Sequence[Loss], made: Made
) -> None:
    """Stop before the update; every process sees the same sums."""
    if not isfinite(metrics["loss"]):
        pairs = zip(made, losses, strict=True)
        bad = [(m, made[m][0]) for m, loss in pairs if not isfinite(float(loss.total))]
        raise NotFiniteError("loss", metrics["loss"], bad)
    if not isfinite(norm):
        raise NotFiniteError("gradient norm", norm, [(m, batch) for m, (batch, _) in made.items()])


class PlainAttention(TorchFunctionMode):
    """A mode in which scaled_dot_product_attention without a mask is `plain_attention`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  torch's protocol
        """Call the replacement where it applies, everything else as it is."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and _applies(args, kwargs):
            return plain_attention(*args[:3], is_causal=kwargs.get("is_causal", False))
        return func(*args, **kwargs)


def _applies(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return (
        len(args) == 3
        and kwargs.get("attn_mask") is None
        and kwargs.get("scale") is None
        and not kwargs.get("enable_gqa", False)
        and args[0].shape == args[1].shape
    )


def plain_attention(
    q: Float[Tensor, "B Q T A"],
    k: Float[Tensor, "B Q T A"],
    v: Float[Tensor, "B Q T A"],
    *,
    is_causal: bool,
) -> Float[Tensor, "B Q T A"]:
    """Return softmax(q k^T / sqrt(A)) v; twin of torch's fused function."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, Q, T, T]
    if is_causal:
        length = scores.shape[-1]
        blocked = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
        scores = scores + blocked
    return torch.softmax(scores, dim=-1, dtype=scores.dtype) @ v


def stopped_at(
    error: NotFiniteError, step: int, folder: Path, parallel: ParallelContext
) -> TrainingError:
    """Return the error that ends the run, and keep this process's batches in `folder/bad_batch.pt`.

    The file is a list of {step, micro, ids, batch}, the batch as plain containers, so that
    torch.load needs no class of ours.
    """
    path = folder / (
        "bad_batch.pt" if parallel.is_main_process else f"bad_batch_{parallel.rank}.pt"
    )
    said = f"the {error.what} of step {step + 1} is {error.value}"
    advice = "lower optim.lr or check that data; nothing of this step is in the weights"
    if not error.batches:
        return TrainingError(f"{said}, from a batch of another process: {advice}")
    ids = [name for _, batch in error.batches for name in _ids(batch)]
    samples = f" (samples {', '.join(ids)})" if ids else ""
    content = [
        {"step": step, "micro": micro, "ids": _ids(batch), "batch": plain(batch)}
        for micro, batch in error.batches
    ]
    try:
        write_whole(content, path)
    except TrainingError as unwritten:
        return TrainingError(f"{said}{samples}: {advice}. Its batch is lost: {unwritten}")
    return TrainingError(f"{said}{samples}: its batch is in {path}; {advice}")


def _ids(batch: object) -> list[str]:
    return [str(name) for name in getattr(batch, "ids", ())]


def plain(value: Any) -> Any:  # noqa: ANN401  a task's own type
    """Return dataclasses as dicts, arrays as tensors, and what is neither as its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if value is None or isinstance(value, (torch.Tensor, str, int, float, bool)):
        return value
    return repr(value)
