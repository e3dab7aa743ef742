"""The batch that a run stopped at, kept so that one can look at it; knows no data."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapilli.train.distributed import Team
from lapilli.train.trainer.contract import NamedBatch, TrainingError
from lapilli.train.trainer.state_file import write_whole
from lapilli.train.trainer.step import NotFiniteError


def stopped_at(error: NotFiniteError, step: int, folder: Path, team: Team) -> TrainingError:
    """The error that ends the run; this process's batches are in `folder/bad_batch.pt`.

    The file is a list of {step, micro, ids, batch}, the batch as plain containers, so that
    torch.load needs no class of ours.
    """
    path = folder / ("bad_batch.pt" if team.leads else f"bad_batch_{team.rank}.pt")
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
    return [str(name) for name in batch.ids] if isinstance(batch, NamedBatch) else []


def plain(value: Any) -> Any:  # noqa: ANN401  a task's own type
    """Dataclasses as dicts, arrays as tensors; what is neither is given as its text."""
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
