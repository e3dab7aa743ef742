"""Programs that collect curves from many runs: TensorBoard and wandb; knows records alone.

A resumed run tells them the same steps again: TensorBoard purges what came after the checkpoint,
and wandb keeps what it has of a step and takes what is new.
"""

import dataclasses
import uuid
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lapilli.errors import ConfigError
from lapilli.train.recipe import TrainerRecipe
from lapilli.train.trainer.metrics import Record


@runtime_checkable
class Tracker(Protocol):
    """Takes the records of a run."""

    def write(self, record: Record) -> None:
        """One more."""
        ...

    def sync(self) -> None:
        """Everything so far is safe when this returns."""
        ...

    def close(self, *, finished: bool) -> None:
        """There are no more; `finished`: the run reached its last step."""
        ...


class TensorBoardTracker:
    """Event files in `folder/tensorboard`.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer: Any = SummaryWriter(folder / "tensorboard", purge_step=first + 1)

    def write(self, record: Record) -> None:
        """One scalar per figure."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def sync(self) -> None:
        """Flush the event file."""
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """End the event file, which does not say how a run ended."""
        self._writer.close()


class WandbTracker:
    """A run of wandb; its id stands in `folder/wandb_id`, so that a resumed run is the same one.

    Without a network set WANDB_MODE=offline: every start of the run leaves a folder in
    `folder/wandb` that `wandb sync` sends later, to the same run.

    Raises:
        ConfigError: wandb is not installed, or does not start.
    """

    def __init__(self, folder: Path, recipe: TrainerRecipe) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise _missing("wandb") from error
        kept = folder / "wandb_id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        try:
            self._run: Any = wandb.init(
                project="lapilli",
                name=folder.resolve().name,
                id=kept.read_text(encoding="utf-8"),
                resume="allow",
                dir=folder,
                config=dataclasses.asdict(recipe),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"run.loggers asks for wandb, which does not start: {error} Without a network set "
                "WANDB_MODE=offline, or take it out of run.loggers"
            ) from error

    def write(self, record: Record) -> None:
        """All figures of a step."""
        figures = {name: value for name, value in record.items() if name != "step"}
        self._run.log(figures, step=int(record["step"]))

    def sync(self) -> None:
        """Nothing to do: records are sent from a process of its own."""

    def close(self, *, finished: bool) -> None:
        """End the run there, as finished or as failed: going on with it makes it run again."""
        self._run.finish(exit_code=0 if finished else 1)


def open_trackers(recipe: TrainerRecipe, folder: Path, first: int) -> list[Tracker]:
    """The trackers that `run.loggers` names.

    Raises:
        ConfigError: one of them is not installed.
    """
    made: list[Tracker] = []
    for name in recipe.run.loggers:
        match name:
            case "tensorboard":
                made.append(TensorBoardTracker(folder, first))
            case "wandb":
                made.append(WandbTracker(folder, recipe))
    return made


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"run.loggers asks for {package}, which is not installed: pip install {package}, or take "
        "it out of run.loggers"
    )
