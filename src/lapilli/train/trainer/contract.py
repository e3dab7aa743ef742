"""What a task gives to the loop, and how a run fails; knows no data and no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lapilli.errors import LapilliError

Plain = str | int | float | bool
Record = Mapping[str, int | float]
"""What the log says of one step."""


class TrainingError(LapilliError, RuntimeError):
    """A run that cannot go on."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Loss of one micro-batch: a sum over what counts, and parts of it for the log.

    Attributes:
        total: what is differentiated.
        parts: sums of the same kind; a tensor is read when the step is over, so that no
            micro-batch waits for the device.
    """

    total: torch.Tensor
    parts: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """What is trained on what."""

    @property
    def model(self) -> nn.Module:
        """Trainable parameters are those that require a gradient."""
        ...

    def batch(self, step: int, micro: int) -> tuple[Any, int]:
        """A micro-batch and how many supervised things it has.

        A function of the two numbers and of nothing else: it may be called in another process,
        ahead of time, or again after a kill.
        """
        ...

    def loss(self, batch: Any) -> Loss:  # noqa: ANN401  the task's own type
        """The summed loss."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Figures on held-out data, the same in every process; `eval_loss` decides what is best."""
        ...


@runtime_checkable
class CountedTask(Task, Protocol):
    """A task that knows how long an epoch is."""

    @property
    def num_samples(self) -> int:
        """Samples (or packed rows) of one epoch."""
        ...


@runtime_checkable
class IdentifiedTask(Task, Protocol):
    """A task that knows what makes another run: a state of another one is refused."""

    def fingerprint(self) -> Mapping[str, Plain]:
        """What decides its batches and what its weights mean, by the recipe's names."""
        ...


@runtime_checkable
class NamingTask(Task, Protocol):
    """A task that knows which samples a micro-batch has before it is made."""

    def names(self, step: int, micro: int) -> Sequence[str]:
        """How messages name them; no media are opened."""
        ...


@runtime_checkable
class NamedBatch(Protocol):
    """A batch that knows which samples it has."""

    @property
    def ids(self) -> Sequence[str]:
        """One per sample."""
        ...


@runtime_checkable
class SkippingBatch(Protocol):
    """A batch that knows which samples it has not."""

    @property
    def skipped(self) -> Sequence[str]:
        """Why each of them could not be read; others stand in for them."""
        ...
