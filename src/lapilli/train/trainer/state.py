"""Trainer checkpoint: what a run needs to go on with the same bits, written whole or not at all.

    folder/state.pt    {step, model, optimizer, average, best, identity, digest}
    folder/state/      the same in pieces, where processes share the weights: sharded_state.py
    folder/best.pt     {step, eval_loss, model, digest}

A file is written aside as NAME.part, flushed to the disk, then renamed over the earlier one: a
kill, a power cut or a full disk at any moment leaves one of the two whole. What is read is checked
before any of it is used (state_file.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lapilli.train.distributed import SINGLE_PROCESS, ParallelContext
from lapilli.train.trainer.contract import Best, RunState, TrainingError
from lapilli.train.trainer.sharded_state import (
    drop_pieces,
    gather,
    load_pieces,
    newest_pieces,
    piece_of,
    place_of,
    save_pieces,
    values_of,
)
from lapilli.train.trainer.state_file import (
    check_fingerprint,
    checked_moments,
    checked_values,
    checked_weights,
    read_state_file,
    write_state_file,
)

_STATE = "state.pt"
_BEST = "best.pt"


def save_state(state: RunState, folder: Path, parallel: ParallelContext = SINGLE_PROCESS) -> Path:
    """Save everything that the next step needs; return where it lies.

    Raises:
        TrainingError: no room on the disk; the earlier checkpoint is whole.
    """
    best = None if state.best is None else (state.best.step, state.best.eval_loss)
    fingerprint = None if state.fingerprint is None else dict(state.fingerprint)
    values = {
        "step": state.step,
        "best": best,
        "skipped": state.skipped,
        "identity": fingerprint,
    }
    if parallel.is_sharded:
        save_pieces(state, folder, parallel, values)
        if parallel.is_main_process:
            (folder / _STATE).unlink(missing_ok=True)  # of earlier steps
        return place_of(folder, state.step)
    path = folder / _STATE
    if not parallel.is_main_process:
        return path
    content = {
        "model": state.trained,
        "optimizer": state.optimizer.state_dict(),
        "average": None if state.average is None else state.average.tensors,
        **values,
    }
    write_state_file(content, path)
    drop_pieces(folder, parallel)  # of earlier steps
    return path


def holds_state(folder: Path) -> bool:
    """Return whether a run can go on from what lies in `folder`."""
    return (folder / _STATE).exists() or newest_pieces(folder) is not None


def load_state(state: RunState, folder: Path, parallel: ParallelContext = SINGLE_PROCESS) -> bool:
    """Load the checkpoint in `folder`; False and nothing changed where there is none.

    Raises:
        TrainingError: the checkpoint is damaged, or of another run: other batches, other weights,
            another optimizer. Of a damaged file nothing is used; of damaged pieces, nothing must be
            used any more.
    """
    path, pieces = folder / _STATE, newest_pieces(folder)
    content = read_state_file(path) if path.exists() else None
    if pieces is not None and (content is None or pieces[0] > checked_values(content, path)[0]):
        values = values_of(pieces[1])
        found = checked_values(values, pieces[1])
        check_fingerprint(state.fingerprint, values.get("identity"), pieces[1])
        load_pieces(state, pieces[1], parallel)
        _go_on(state, found)
        return True
    if content is None:
        return False
    found = checked_values(content, path)
    check_fingerprint(state.fingerprint, content.get("identity"), path)
    weights = checked_weights(state.trained, content.get("model"), path, "model")
    moments = checked_moments(state.optimizer, content.get("optimizer"), path)
    averages = weights
    if state.average is not None and content.get("average") is not None:
        averages = checked_weights(state.average.tensors, content["average"], path, "average")
    _put(weights, state.trained)
    _load_moments(state.optimizer, moments)
    if state.average is not None:
        _put(averages, state.average.tensors)
    _go_on(state, found)
    return True


def _go_on(state: RunState, found: tuple[int, int, tuple[int, float] | None]) -> None:
    state.step, state.skipped, best = found
    state.best = None if best is None else Best(*best)


def _put(whole: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors over our own, of which this process may have pieces."""
    with torch.no_grad():
        for name, value in whole.items():
            ours[name].copy_(piece_of(value, ours[name]))


def _load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[int, dict[str, Any]]) -> None:
    """Load the moments of the checkpoint under the recipe's own learning rates and decay."""
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {key: _piece(value, owners[number]) for key, value in kept.items()}
        for number, kept in saved.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _piece(value: Any, parameter: torch.Tensor) -> Any:  # noqa: ANN401  whatever an optimizer keeps
    return piece_of(value, parameter) if isinstance(value, torch.Tensor) else value


def save_best(state: RunState, folder: Path, parallel: ParallelContext = SINGLE_PROCESS) -> None:
    """Save the weights of this moment as the best so far: the averages where the run keeps them."""
    if state.best is None:
        return
    weights = state.trained if state.average is None else state.average.tensors
    if parallel.is_sharded:
        weights = gather(weights, parallel)
    content = {"step": state.best.step, "eval_loss": state.best.eval_loss, "model": weights}
    if parallel.is_main_process:
        write_state_file(content, folder / _BEST)
    parallel.wait()  # whoever loads it next finds it


def load_best(state: RunState, folder: Path) -> None:
    """Put the best weights into the model; see `read_best`."""
    _put(read_best(state, folder), state.trained)


def read_best(state: RunState, folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the best weights, checked against the model, which stays as it is.

    Raises:
        TrainingError: the file is missing, damaged or of another recipe.
    """
    path = folder / _BEST
    if not path.exists():
        raise TrainingError(
            f"{path} is missing, and the run says that its best step was "
            f"{state.best.step if state.best else None}: train again, or set run.keep_best = false"
        )
    return checked_weights(state.trained, read_state_file(path).get("model"), path, "model")
