"""A run's state in pieces, each process writing its own; read by any number of processes.

    folder/state/000120/     step 120: torch.distributed.checkpoint's files and values.json
    folder/state/000160.part being written; whole only under its final name

    model.NAME               a trained weight           all by parameter name, so that neither the
    optimizer.NAME.KEY       its moments, its step      number of processes nor the order of the
    average.NAME             its average                optimizer's groups matters

Knows tensors and files; knows no loop.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from lapilli.shapes import Tensor
from lapilli.train.contract import TrainingError
from lapilli.train.parallel import Team

_FOLDER: Final = "state"
_VALUES: Final = "values.json"
_STAGED: Final = ".part"


def gather(tensors: Mapping[str, Tensor], team: Team) -> dict[str, Tensor]:
    """Whole tensors in the lead's memory, from pieces or not; nothing in the other processes.

    All processes have to call it, with the same names; one tensor at a time is put together.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if team.leads:
            whole[name] = found.detach().cpu()
    return whole


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a tensor that everyone has, cut as `like` is; whole if `like` is."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def newest_pieces(folder: Path) -> tuple[int, Path] | None:
    """The last step of a run that was saved in pieces and whole, and where; None: there is none."""
    found = [p for p in (folder / _FOLDER).glob("*") if p.name.isdigit()]
    newest = max(found, key=lambda path: int(path.name), default=None)
    return None if newest is None else (int(newest.name), newest)


def place_of(folder: Path, step: int) -> Path:
    """Where the pieces of a step lie."""
    return folder / _FOLDER / f"{step:06d}"


def save_pieces(
    folder: Path,
    team: Team,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor] | None,
    step: int,
    values: Mapping[str, Any],
) -> None:
    """Everything that the next step needs, each process its own pieces; all have to call it.

    Earlier states in pieces go when this one is whole.

    Args:
        folder: of the run.
        team: of the run.
        model: its trainable parameters are saved.
        optimizer: over these parameters.
        average: of these parameters, by their names.
        step: steps done.
        values: anything else that JSON can hold.

    Raises:
        TrainingError: a disk does not take it, in every process; the earlier state is whole.
    """
    place = place_of(folder, step)
    staged = place.with_name(place.name + _STAGED)
    if team.leads:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    team.wait()
    tensors = dict(_tensors(model, optimizer, average))
    try:
        with _without_hint():
            save(tensors, checkpoint_id=staged, no_dist=team.size == 1)
        if team.leads:
            _finish(staged, place, {**values, "step": step})
    except (CheckpointException, OSError) as error:
        raise TrainingError(
            f"{place} cannot be written ({_reason(error)}); the earlier checkpoint is whole. Make "
            "room (or raise the quota) and start the same command again"
        ) from error
    team.wait()


def _finish(staged: Path, place: Path, values: Mapping[str, Any]) -> None:
    """The staged state under its own name; earlier ones are removed."""
    with (staged / _VALUES).open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    staged.rename(place)
    for other in place.parent.iterdir():
        if other != place:
            shutil.rmtree(other)


def drop_pieces(folder: Path, team: Team) -> None:
    """Remove states in pieces, when a newer one is whole in a file."""
    if team.leads:
        shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def values_of(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors, with "step".

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        values: dict[str, Any] = json.loads((path / _VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path / _VALUES} cannot be read ({error})") from error
    return values


def load_pieces(
    path: Path,
    team: Team,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor] | None,
) -> None:
    """Fill model, optimizer and average from what any number of processes has saved.

    Args:
        path: what `newest_pieces` found.
        team: of this run; it may be another one than saved the state.
        model: whole or in pieces.
        optimizer: over its trainable parameters; its own learning rates stay.
        average: filled from the weights where the saved run kept none.

    Raises:
        TrainingError: the state is of another recipe, or a file of it is missing.
    """
    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        parameters = _trained(model)
        _check(parameters, stored, path)
        moments = _empty_moments(parameters, stored)
        tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
        tensors |= {f"optimizer.{name}.{key}": value for (name, key), value in moments.items()}
        for name, value in (average or {}).items():
            kept = f"average.{name}" in stored
            tensors |= {f"average.{name}": value} if kept else {}
        with _without_hint():  # everyone in a team of whole models reads for itself
            load(tensors, checkpoint_id=path, no_dist=not team.is_sharded)
    except (CheckpointException, OSError) as error:
        raise TrainingError(f"{path} cannot be read ({_reason(error)})") from error
    with torch.no_grad():
        for name, value in (average or {}).items():
            if f"average.{name}" not in stored:
                value.copy_(parameters[name])
    _fill_optimizer(optimizer, parameters, moments)


@contextmanager
def _without_hint() -> Iterator[None]:
    """Torch tells whoever asks for a single process that it is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        yield


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _trained(model).items():
        yield f"model.{name}", parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer.{name}.{key}", value
    for name, value in (average or {}).items():
        yield f"average.{name}", value


def _check(ours: Mapping[str, Tensor], stored: Mapping[str, Any], path: Path) -> None:
    theirs = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    for name in sorted(set(ours) | set(theirs)):
        expected = tuple(ours[name].shape) if name in ours else "nothing (it is frozen or absent)"
        found = theirs.get(name, "nothing")
        if found != expected:
            raise TrainingError(
                f"{path} has {found} for {name}, and this recipe trains {expected}: go on with "
                "the recipe that began the run, or train into another folder"
            )


def _empty_moments(
    parameters: Mapping[str, nn.Parameter], stored: Mapping[str, Any]
) -> dict[tuple[str, str], Tensor]:
    """Room for what the optimizer keeps of each parameter, in pieces where that is."""
    made: dict[tuple[str, str], Tensor] = {}
    for full, entry in stored.items():
        if not full.startswith("optimizer."):
            continue
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        parameter, dtype = parameters[name], entry.properties.dtype
        if entry.size == parameter.shape:
            made[name, key] = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            made[name, key] = torch.zeros(entry.size, dtype=dtype, device=parameter.device)
    return made


def _fill_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    moments: Mapping[tuple[str, str], Tensor],
) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for (name, key), value in moments.items():
        state.setdefault(order.index(name), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _reason(error: BaseException) -> str:
    """The first failure of the processes, without their tracebacks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"process {rank}: {type(failure).__name__}: {failure}"
    return str(error)
