"""Types that the trainer's files share: the task, its loss, the state of a run and its errors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lapilli.errors import LapilliError
from lapilli.train.trainer.optim import Average

Plain = str | int | float | bool
Record = Mapping[str, int | float]
"""What the log says of one step."""


class TrainingError(LapilliError, RuntimeError):
    """A run that cannot go on."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one micro-batch: a sum over what counts, and parts of it for the log.

    Attributes:
        total: what is differentiated.
        parts: sums of the same kind; a tensor is read when the step is over, so that no
            micro-batch waits for the device.
    """

    total: torch.Tensor
    parts: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A model and what it is trained on.

    A task may have more, which the loop uses where it is there:
        num_samples: samples (or packed sequences) of one epoch, for a run that counts epochs.
        fingerprint(): what decides its batches and what its weights mean, by the recipe's names; a
            state of another run is refused.
        names(step, micro): how messages name the samples of a micro-batch; no media are opened.
    and so may its batches:
        ids: names of its samples.
        skipped: why samples that others stand in for could not be read.
    """

    @property
    def model(self) -> nn.Module:
        """Return the model; its trainable parameters are those that require a gradient."""
        ...

    def batch(self, step: int, micro: int) -> tuple[Any, int]:
        """Return a micro-batch and how many supervised things it has.

        A function of the two numbers and of nothing else: it may be called in another process,
        ahead of time, or again after a kill.
        """
        ...

    def loss(self, batch: Any) -> Loss:  # noqa: ANN401  the task's own type
        """Return the summed loss."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Return metrics on held-out data; the lowest `eval_loss` decides what is best."""
        ...


@dataclass(frozen=True, slots=True)
class Best:
    """The evaluation with the lowest loss so far."""

    step: int
    eval_loss: float


@dataclass(slots=True)
class RunState:
    """The state of a run; everything else is a function of its fingerprint and the step.

    Attributes:
        skipped: samples so far that could not be read.
        fingerprint: what makes it another run, by the recipe's names; None: its task does not say.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    step: int = 0
    skipped: int = 0
    best: Best | None = None
    fingerprint: Mapping[str, Plain] | None = None

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """Return the weights that the run changes, by parameter name."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
