"""Averages of the trained weights over the steps; knows no files and no loop."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
        """The averages become the model's weights."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages; afterwards its own weights again, bit by bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.put_into_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])
