"""Several processes that train one model: who reads what, and sums over all; knows no model.

process r of n reads micro-batches r, r + n, ...     gradients and counts are summed     every
process takes
                                                                                         the same
                                                                                         step
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lapilli.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Team:
    """This process among all: `rank` of `size`; a team of one needs no network."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"process {self.rank} of {self.size}: ranks are 0 to {self.size - 1}")

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def own(self, number: int) -> range:
        """Which of `number` micro-batches this process reads."""
        return range(self.rank, number, self.size)

    def sum_counts(self, counts: list[int]) -> list[int]:
        """Element-wise sum over all processes."""
        if self.size == 1:
            return counts
        total = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(total)
        return [int(count) for count in total]

    def sum_floats(self, values: dict[str, float]) -> dict[str, float]:
        """Sum over all processes of every value; all processes have the same names."""
        if self.size == 1:
            return values
        total = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(sorted(values), total.tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every gradient replaced by its sum over all processes; a missing one counts as zero."""
        if self.size == 1:
            return
        owners = list(parameters)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in owners]
        )
        dist.all_reduce(flat)
        for parameter, part in zip(
            owners, torch.split(flat, [p.numel() for p in owners]), strict=True
        ):
            parameter.grad = part.view_as(parameter)


ALONE = Team()


def join_team(rank: int, size: int, meeting: Path) -> Team:
    """Meet the other processes at a file that does not exist before the first comes."""
    if size > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    return Team(rank, size)
