"""What a run needs to go on with the same bits: files, written whole or not at all.

folder/state.pt    {step, model, optimizer, average, best, identity}
folder/state/      the same in pieces, where several processes share the weights: sharded.py
folder/best.pt     {step, eval_loss, model}

A file is written aside as NAME.part, flushed to the disk, then renamed over the earlier one: a
kill, a power cut or a full disk at any moment leaves one of the two whole.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lapilli.train.contract import Plain, TrainingError
from lapilli.train.ema import Average
from lapilli.train.parallel import ALONE, Team
from lapilli.train.sharded import (
    drop_pieces,
    gather,
    load_pieces,
    newest_pieces,
    piece_of,
    place_of,
    save_pieces,
    values_of,
)

_STATE = "state.pt"
_BEST = "best.pt"


@dataclass(frozen=True, slots=True)
class Best:
    """The evaluation with the lowest loss so far."""

    step: int
    eval_loss: float


@dataclass(slots=True)
class RunState:
    """Where a run stands; everything else is a function of its identity and the step.

    Attributes:
        skipped: samples so far that could not be read.
        identity: what makes it another run, by the recipe's names; None: its task does not say.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    step: int = 0
    skipped: int = 0
    best: Best | None = None
    identity: Mapping[str, Plain] | None = None

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that the run changes, by parameter name."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}


def save_state(state: RunState, folder: Path, team: Team = ALONE) -> Path:
    """Everything that the next step needs, and where it lies.

    Raises:
        TrainingError: no room on the disk; the earlier checkpoint is whole.
    """
    best = None if state.best is None else (state.best.step, state.best.eval_loss)
    average = None if state.average is None else state.average.tensors
    identity = None if state.identity is None else dict(state.identity)
    values = {"best": best, "skipped": state.skipped, "identity": identity}
    if team.is_sharded:
        save_pieces(
            folder,
            team,
            model=state.model,
            optimizer=state.optimizer,
            average=average,
            step=state.step,
            values=values,
        )
        if team.leads:
            (folder / _STATE).unlink(missing_ok=True)  # of earlier steps
        return place_of(folder, state.step)
    path = folder / _STATE
    if not team.leads:
        return path
    content = {
        "step": state.step,
        "model": state.trained,
        "optimizer": state.optimizer.state_dict(),
        "average": average,
        **values,
    }
    write_whole(content, path)
    drop_pieces(folder, team)  # of earlier steps
    return path


def holds_state(folder: Path) -> bool:
    """Whether a run can go on from what lies in `folder`."""
    return (folder / _STATE).exists() or newest_pieces(folder) is not None


def load_state(state: RunState, folder: Path, team: Team = ALONE) -> bool:
    """Go on from the checkpoint in `folder`; False and nothing changed where there is none.

    Raises:
        TrainingError: the checkpoint is of another run: other batches, other weights, another
            optimizer.
    """
    path, pieces = folder / _STATE, newest_pieces(folder)
    content = None
    if path.exists():
        content = torch.load(path, map_location="cpu", weights_only=True)
    if pieces is not None and (content is None or pieces[0] > int(content["step"])):
        average = None if state.average is None else state.average.tensors
        values = values_of(pieces[1])
        _check_identity(state.identity, values.get("identity"), pieces[1])
        load_pieces(pieces[1], team, model=state.model, optimizer=state.optimizer, average=average)
        _go_on(state, values)
        return True
    if content is None:
        return False
    _check_identity(state.identity, content.get("identity"), path)
    _put(content["model"], state.trained, path)
    _load_optimizer(state.optimizer, content["optimizer"], path)
    if state.average is not None:
        _put(content.get("average") or content["model"], state.average.tensors, path)
    _go_on(state, content)
    return True


def _go_on(state: RunState, values: Mapping[str, Any]) -> None:
    best = values.get("best")
    state.best = None if best is None else Best(*best)
    state.step, state.skipped = int(values["step"]), int(values.get("skipped", 0))


def _put(whole: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], path: Path) -> None:
    """Saved tensors over our own, of which this process may have pieces."""
    _check_names(ours, whole, path)
    with torch.no_grad():
        for name, value in whole.items():
            ours[name].copy_(piece_of(value, ours[name]))


def save_best(state: RunState, folder: Path, team: Team = ALONE) -> None:
    """The weights of this moment as the best so far: the averages where the run keeps them."""
    if state.best is None:
        return
    weights = state.trained if state.average is None else state.average.tensors
    if team.is_sharded:
        weights = gather(weights, team)
    content = {"step": state.best.step, "eval_loss": state.best.eval_loss, "model": weights}
    if team.leads:
        write_whole(content, folder / _BEST)
    team.wait()  # whoever loads it next finds it


def load_best(state: RunState, folder: Path, team: Team = ALONE) -> None:
    """Put the best weights into the model.

    Raises:
        TrainingError: the file is missing or of another recipe.
    """
    del team
    path = folder / _BEST
    if not path.exists():
        raise TrainingError(
            f"{path} is missing, and the run says that its best step was "
            f"{state.best.step if state.best else None}: train again, or set run.keep_best = false"
        )
    content = torch.load(path, map_location="cpu", weights_only=True)
    _put(content["model"], state.trained, path)


def write_whole(content: Any, path: Path) -> None:  # noqa: ANN401  whatever torch.save takes
    """torch.save that replaces `path` at once, when every byte is on the disk.

    Raises:
        TrainingError: the disk does not take it; `path` is as it was.
    """
    staged = path.with_suffix(".part")
    try:
        with staged.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if _disk_error(error) is None:
            raise
        staged.unlink(missing_ok=True)
        needed = sum(tensor.nbytes for tensor in _tensors(content))
        raise TrainingError(_no_room(path, needed, _disk_error(error))) from error


def _no_room(path: Path, needed: int, error: OSError | None) -> str:
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    kept = f"the earlier {path.name} is whole" if path.exists() else f"there is no {path.name} yet"
    return (
        f"{path} cannot be written ({error}): about {needed:,} bytes are needed, {free:,} are "
        f"free; {kept}. Make room (or raise the quota) and start the same command again"
    )


def _disk_error(error: BaseException) -> OSError | None:
    """What the disk said: torch's writer answers a failed write with an error of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(content: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401  nested containers
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)


def _check_identity(
    ours: Mapping[str, Plain] | None, theirs: Mapping[str, Plain] | None, path: Path
) -> None:
    """Refuse a checkpoint of another run; one that does not say is believed."""
    if ours is None or theirs is None:
        return
    names = [*theirs, *(name for name in ours if name not in theirs)]
    differ = [name for name in names if ours.get(name) != theirs.get(name)]
    if differ:
        told = "; ".join(
            f"{name}: the state says {_said(theirs, name)}, the recipe {_said(ours, name)}"
            for name in differ
        )
        raise TrainingError(
            f"{path} is of another run ({told}): go on with the recipe that began "
            "the run, or train into another folder"
        )


def _said(identity: Mapping[str, Plain], name: str) -> str:
    return repr(identity[name]) if name in identity else "nothing"


def _check_names(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Refuse a checkpoint of other weights; a silent half would be another run."""
    for name in sorted(set(ours) | set(theirs)):
        found = tuple(theirs[name].shape) if name in theirs else "nothing"
        expected = tuple(ours[name].shape) if name in ours else "nothing (it is frozen or absent)"
        if found != expected:
            raise TrainingError(
                f"{path} has {found} for {name}, and this recipe trains {expected}: go on with "
                "the recipe that began the run, or train into another folder"
            )


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: Path) -> None:
    """The moments of the checkpoint under the recipe's own learning rates and decay."""
    ours = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        moments = {
            number: {key: _piece(value, owners[number]) for key, value in kept.items()}
            for number, kept in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": moments})
    except (ValueError, IndexError) as error:
        raise TrainingError(
            f"{path} has other parameter groups ({error}): go on with the recipe that began the "
            "run, or train into another folder"
        ) from error
    for group, settings in zip(optimizer.param_groups, ours, strict=True):
        group.update(settings)


def _piece(value: Any, parameter: torch.Tensor) -> Any:  # noqa: ANN401  whatever an optimizer keeps
    return piece_of(value, parameter) if isinstance(value, torch.Tensor) else value
