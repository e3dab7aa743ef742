"""Trainer checkpoint: what a run needs to go on with the same bits, written whole or not at all.

    folder/state.pt              {step, model, optimizer, average, best, identity, digest}
    folder/best.pt               {step, eval_loss, model, digest}
    folder/state/000120/         step 120 in pieces, where processes share the weights:
                                 torch.distributed.checkpoint's files and values.json
    folder/state/000160.part     being written; whole only under its final name

    model.NAME                   a trained weight      the pieces, all by parameter name, so that
    optimizer.NAME.KEY           its moments, its step neither the number of processes nor the
    average.NAME                 its average           order of the optimizer's groups matters

Each process writes its pieces, any number of processes reads them. A file is written aside as
NAME.part, flushed to the disk, then renamed over the earlier one: a kill, a power cut or a full
disk at any moment leaves one of the two whole. What is read is checked before any of it is used
(state_file.py).
"""

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from lapilli.checkpoint.source import read_json
from lapilli.disk import advice_on
from lapilli.errors import CheckpointError
from lapilli.shapes import Tensor
from lapilli.train.data.dataset import data_file
from lapilli.train.distributed import SINGLE_PROCESS, ParallelContext
from lapilli.train.trainer.state_file import (
    check_archive,
    check_fingerprint,
    check_moment_shape,
    check_numbers,
    check_shapes,
    checked_moments,
    checked_values,
    checked_weights,
    damaged,
    disk_error,
    first_line,
    read_state_file,
    write_state_file,
)
from lapilli.train.trainer.task import RunState, TrainingError

_FOLDER: Final = "state"
_VALUES: Final = "values.json"
_STAGED: Final = ".part"
_DIRECTORY: Final = "directory"
"""In values.json: the digest of .metadata; the pieces have checksums of their own."""
_METADATA: Final = "torch.distributed.checkpoint.metadata"
_NAMED: Final = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
        *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", name) for name in ("float16", "bfloat16", "float32", "float64")),
        *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
        *((module, "WindowsPath") for module in ("pathlib", "pathlib._local")),
    }
)
"""All that the directory of pieces names; a pickle that names anything else would run code."""


def gather(tensors: Mapping[str, Tensor], parallel: ParallelContext) -> dict[str, Tensor]:
    """Return whole tensors in the main process's memory; nothing in the other processes.

    All processes have to call it, with the same names; one tensor at a time is put together.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if parallel.is_main_process:
            whole[name] = found.detach().cpu()
    return whole


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's piece of a tensor that everyone has, cut as `like` is."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def newest_pieces(folder: Path) -> tuple[int, Path] | None:
    """Return the last step that was saved in pieces and whole, and where; None for none."""
    found = [p for p in (folder / _FOLDER).glob("*") if p.name.isascii() and p.name.isdigit()]
    newest = max(found, key=lambda path: int(path.name), default=None)
    return None if newest is None else (int(newest.name), newest)


def place_of(folder: Path, step: int) -> Path:
    """Return where the pieces of a step lie."""
    return folder / _FOLDER / f"{step:06d}"


def save_pieces(
    state: RunState, folder: Path, parallel: ParallelContext, values: Mapping[str, Any]
) -> None:
    """Save what the next step needs, each process its own pieces; all have to call it.

    Earlier states in pieces go when this one is whole.

    JSON can hold `values`, which are kept beside the tensors.

    Raises:
        TrainingError: a disk does not take it, in every process; the earlier state is whole.
    """
    place = place_of(folder, state.step)
    staged = place.with_name(place.name + _STAGED)
    if parallel.is_main_process:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    parallel.wait()
    tensors = dict(_tensors(state))
    try:
        with _without_hint():
            save(tensors, checkpoint_id=staged, no_dist=parallel.size == 1)
        if parallel.is_main_process:
            _finish(staged, place, values)
    except (CheckpointException, OSError) as error:
        raise TrainingError(
            f"{place} cannot be written ({_reason(error)}); the earlier checkpoint is whole. "
            f"{advice_on(disk_error(_first(error)))} and start the same command again"
        ) from error
    parallel.wait()


def _finish(staged: Path, place: Path, values: Mapping[str, Any]) -> None:
    """Move the staged state under its own name, and remove earlier ones."""
    values = {**values, _DIRECTORY: data_file(staged / ".metadata").digest}
    with (staged / _VALUES).open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    staged.rename(place)
    for other in place.parent.iterdir():
        if other != place:
            shutil.rmtree(other)


def values_of(path: Path) -> dict[str, Any]:
    """Return what was saved beside the tensors, with "step".

    Raises:
        TrainingError: the file is missing or damaged.
    """
    place, directory = path / _VALUES, path / ".metadata"
    for needed in (place, directory):
        if not needed.is_file():
            raise damaged(path, f"{needed.name} is missing")
    try:
        values = dict(read_json(place))
        digest = data_file(directory).digest
    except (OSError, CheckpointError) as error:
        raise damaged(place, first_line(error)) from error
    said = values.get(_DIRECTORY)  # absent: of an earlier version
    if said is not None and said != digest:
        raise damaged(path, "its directory is not the one that was saved")
    if values.get("step") != int(path.name):
        raise damaged(place, f"step is {values.get('step')!r:.80}, the folder says {path.name}")
    return values


def load_pieces(state: RunState, path: Path, parallel: ParallelContext) -> None:
    """Fill model, optimizer and average from what any number of processes has saved.

    The average is filled from the weights where the saved run kept none; the optimizer keeps its
    own learning rates.

    Raises:
        TrainingError: the state is of another recipe, or a file of it is missing.
    """
    reader, parameters = _Reader(path), state.trained
    average = {} if state.average is None else state.average.tensors
    try:
        stored = reader.read_metadata().state_dict_metadata
        _check(parameters, average, stored, path)
        moments = _empty_moments(parameters, stored)
        tensors = {f"model.{name}": weight for name, weight in parameters.items()}
        tensors |= {f"optimizer.{name}.{key}": value for (name, key), value in moments.items()}
        for name, value in average.items():
            kept = f"average.{name}" in stored
            tensors |= {f"average.{name}": value} if kept else {}
        with _without_hint():  # every process with a whole model reads for itself
            load(tensors, storage_reader=reader, no_dist=not parallel.is_sharded)
    except TrainingError:
        raise
    except (Exception, CheckpointException) as error:  # every parser in there has its own errors
        raise damaged(path, _reason(error)) from error
    for name, value in tensors.items():
        squares = name.endswith((".step", ".exp_avg_sq")) and name.startswith("optimizer.")
        check_numbers(value, path, name, not_negative=squares)
    with torch.no_grad():
        for name, value in average.items():
            if f"average.{name}" not in stored:
                value.copy_(parameters[name])
    _fill_optimizer(state, moments)


@contextmanager
def _without_hint() -> Iterator[None]:
    """Silence torch, which tells whoever asks for a single process that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        yield


def _tensors(state: RunState) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            yield f"model.{name}", parameter.detach()
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer.{name}.{key}", value
    if state.average is not None:
        for name, value in state.average.tensors.items():
            yield f"average.{name}", value


class _Reader(FileSystemReader):
    """Torch's reader, which runs no code that a file names and looks at what it reads."""

    def read_metadata(self, *_args: Any, **_more: Any) -> Metadata:  # noqa: ANN401  torch's own
        """Return the directory of all pieces, where each lies inside its file."""
        path = Path(self.path)
        with (path / ".metadata").open("rb") as file:
            found = _Directory(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
            raise damaged(path, "its directory names no tensors")
        for place in (found.storage_data or {}).values():
            piece = path / Path(place.relative_path).name
            end = place.offset + place.length if place.offset >= 0 <= place.length else -1
            if not piece.is_file() or str(place.relative_path) != piece.name:
                raise damaged(path, f"there is no file {place.relative_path}")
            if not 0 <= end <= piece.stat().st_size:
                raise damaged(path, f"{piece.name} is cut short")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def _slice_file(self, file: Any, sinfo: Any) -> io.BytesIO:  # noqa: ANN401  torch's own
        """Return one piece of a file, whose checksum is right."""
        piece = io.BytesIO(super()._slice_file(file, sinfo).read(sinfo.length))
        check_archive(piece, sinfo.length)
        piece.seek(0)
        return piece


class _Directory(pickle.Unpickler):
    """An unpickler of what torch has written about the pieces; it runs no code."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  a class or a value
        """Return one of the few things that a directory names."""
        if (module, name) not in _NAMED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which would be run")
        return super().find_class(module, name)


def _check(
    ours: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    stored: Mapping[str, Any],
    path: Path,
) -> None:
    """Refuse what is stored for other weights, or in shapes that no memory of ours has."""
    kinds: dict[str, dict[str, tuple[int, ...]]] = {"model": {}, "optimizer": {}, "average": {}}
    for full, entry in stored.items():
        kind, _, name = str(full).partition(".")
        if kind not in kinds or not isinstance(entry, TensorStorageMetadata):
            raise damaged(path, f"{full!s:.80} is no tensor of a state")
        kinds[kind][name] = tuple(entry.size)
    check_shapes(ours, kinds["model"], path)
    if kinds["average"]:
        kept = {name: shape for name, shape in kinds["average"].items() if name in average}
        check_shapes({name: average[name] for name in kept}, kept, path)
    for full, shape in kinds["optimizer"].items():
        name, _, key = full.rpartition(".")
        if name not in ours:
            raise damaged(path, f"it has moments of {name!s:.80}, which is not trained")
        check_moment_shape(shape, ours[name], key, path, f"optimizer.{full}")


def _empty_moments(
    parameters: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> dict[tuple[str, str], Tensor]:
    """Return room for what the optimizer keeps of each parameter, in pieces where that is."""
    made: dict[tuple[str, str], Tensor] = {}
    for full, entry in stored.items():
        if not full.startswith("optimizer."):
            continue
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        parameter, dtype = parameters[name], entry.properties.dtype
        if entry.size == parameter.shape:
            made[name, key] = torch.zeros_like(parameter, dtype=dtype)
        else:
            made[name, key] = torch.zeros(entry.size, dtype=dtype, device=parameter.device)
    return made


def _fill_optimizer(state: RunState, moments: Mapping[tuple[str, str], Tensor]) -> None:
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    order = [names[id(p)] for group in state.optimizer.param_groups for p in group["params"]]
    kept: dict[int, dict[str, Tensor]] = {}
    for (name, key), value in moments.items():
        kept.setdefault(order.index(name), {})[key] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": kept})


def _reason(error: BaseException) -> str:
    """Return the first failure of the processes, without their tracebacks."""
    said = first_line(_first(error))
    if isinstance(error, CheckpointException) and error.failures:
        return f"process {next(iter(error.failures))}: {said}"
    return said


def _first(error: BaseException) -> BaseException:
    """Return the first failure of the processes, or the error itself."""
    if isinstance(error, CheckpointException) and error.failures:
        failure: BaseException = next(iter(error.failures.values()))[0]
        return failure
    return error


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
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)  # of earlier steps
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
        state.step, state.skipped, state.best = found
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
    state.step, state.skipped, state.best = found
    return True


def _put(whole: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors over our own, of which this process may have pieces."""
    with torch.no_grad():
        for name, value in whole.items():
            ours[name].copy_(piece_of(value, ours[name]))


def _load_moments(optimizer: torch.optim.Optimizer, saved: Mapping[int, dict[str, Any]]) -> None:
    """Load the moments of the checkpoint under the recipe's own learning rates and decay."""
    owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            key: piece_of(value, owners[number]) if isinstance(value, torch.Tensor) else value
            for key, value in kept.items()
        }
        for number, kept in saved.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


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
