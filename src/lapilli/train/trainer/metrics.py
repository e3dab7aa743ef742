"""Metrics of a run: log.jsonl, TensorBoard, wandb, a progress bar, and what the losses tell.

    write(record)    a line of the log: log.jsonl, TensorBoard, wandb
    tick(record)     every step: the bar
    mean of the latest losses  >  lowest mean so far + 1 + noise  ->  the learning rate is too large
    at the end       loss.png, the loss over the steps

A run that resumes drops the lines after its checkpoint, so that a killed run leaves the same log as
an undisturbed one; TensorBoard purges them, and wandb keeps what it has of a step and takes what is
new. Processes that are not the main process have a logger that writes nothing. A loss that is
infinite or no number ends a run (step.py); one that rises only does not. The only file of the
trainer that imports matplotlib.
"""

import dataclasses
import json
import os
import resource
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lapilli.config.reader import parse_json
from lapilli.disk import advice_on
from lapilli.errors import CheckpointError, ConfigError
from lapilli.train.distributed import ParallelContext
from lapilli.train.recipe import TrainerRecipe
from lapilli.train.trainer.task import Record, TrainingError

_LONGEST: Final = 1 << 20
"""Bytes of a line; the longest that is written has a thousandth of it."""


class RunLog:
    """The log of a run, `folder/log.jsonl`, repeated on standard error where `echo` asks for it."""

    def __init__(self, folder: Path, *, echo: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self._echo = echo

    def rewind(self, step: int) -> None:
        """Drop every record after this step."""
        if not self.path.exists():
            return
        found = self.records()
        kept = [record for record in found if record["step"] <= step]
        if len(kept) == len(found) and self.path.read_bytes().endswith(b"\n"):
            return
        staged = self.path.with_suffix(".part")
        staged.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        staged.replace(self.path)

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            TrainingError: the disk does not take it.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written ({error}). {advice_on(error)} and start the same "
                "command again: the run goes on from its last checkpoint"
            ) from error
        if self._echo:
            self.say(self.line(record))

    @staticmethod
    def say(text: str) -> None:
        """Write one line to standard error."""
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))

    def sync(self) -> None:
        """Flush everything written so far to the disk, so that it survives a power cut."""
        if self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """Return all records so far; a last line that a kill cut short is left out.

        Raises:
            TrainingError: a line is no JSON.
        """
        if not self.path.exists():
            return []
        found: list[Record] = []
        with self.path.open("rb") as file:
            for number, line in enumerate(iter(partial(file.readline, _LONGEST + 1), b""), 1):
                if len(line) > _LONGEST:
                    raise self._damaged(number, f"more than {_LONGEST} bytes")
                if line.endswith(b"\n") and line != b"\n":
                    found.append(self._record(number, line))
        return found

    def _record(self, number: int, line: bytes) -> Record:
        try:
            found = parse_json(line, f"line {number}")
        except CheckpointError as error:
            raise self._damaged(number, str(error)) from error
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise self._damaged(number, "expected an object with a step")
        return found

    def _damaged(self, number: int, what: str) -> TrainingError:
        return TrainingError(
            f"{self.path}:{number} is damaged ({what}): delete the line and start again"
        )

    @staticmethod
    def line(record: Record) -> str:
        """Return a record as a line for people."""
        parts = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in record.items()
        )
        return "  ".join(parts)


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
        """Write one scalar per metric."""
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
        """Log all metrics of a step."""
        metrics = {name: value for name, value in record.items() if name != "step"}
        self._run.log(metrics, step=int(record["step"]))

    def sync(self) -> None:
        """Do nothing: records are sent from a process of its own."""

    def close(self, *, finished: bool) -> None:
        """End the run there, as finished or as failed: going on with it makes it run again."""
        self._run.finish(exit_code=0 if finished else 1)


Tracker = TensorBoardTracker | WandbTracker


def open_trackers(recipe: TrainerRecipe, folder: Path, first: int) -> list[Tracker]:
    """Open the trackers that `run.loggers` names.

    Raises:
        ConfigError: one of them is not installed.
    """
    return [
        TensorBoardTracker(folder, first) if name == "tensorboard" else WandbTracker(folder, recipe)
        for name in recipe.run.loggers
    ]


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"run.loggers asks for {package}, which is not installed: pip install {package}, or take "
        "it out of run.loggers"
    )


_WINDOW: Final = 20  # steps that the speed is taken over


class ProgressBar:
    """A bar with steps, loss, speed, memory and the time that is left, redrawn in place.

    `done` steps of all are of earlier runs. None as `console` is standard error, terminal or not.
    """

    def __init__(
        self, done: int, steps: int, title: str, *, console: Console | None = None
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console or Console(stderr=True, force_terminal=True),
        )
        self._task = self._progress.add_task(title, total=steps, completed=done, metrics="")
        self._ticks: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._progress.start()

    def tick(self, record: Record, count: int) -> None:
        """Show one more step with its loss and memory, and how many tokens it learned from."""
        self._ticks.append((time.monotonic(), count))
        (first, skipped), (last, _) = self._ticks[0], self._ticks[-1]
        tokens = sum(number for _, number in self._ticks) - skipped
        speed = f"{tokens / (last - first):,.0f} tokens/s  " if last > first else ""
        metrics = f"loss {record['loss']:.4f}  {speed}{record['gib']:.1f} GiB"
        self._progress.update(self._task, completed=record["step"], metrics=metrics)

    def say(self, text: str) -> None:
        """Write one line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state of the bar standing."""
        self._progress.stop()


_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


class MetricsLogger:
    """Everything that the metrics of a run go to; without a log this process writes nothing."""

    def __init__(
        self,
        log: RunLog | None = None,
        trackers: Sequence[Tracker] = (),
        *,
        bar: ProgressBar | None = None,
        plot: bool = False,
    ) -> None:
        self._log, self._trackers, self._bar, self._plot = log, tuple(trackers), bar, plot

    def tick(self, record: Record, count: int) -> None:
        """Show that a step is done."""
        if self._bar is not None:
            self._bar.tick(record, count)

    def write(self, record: Record) -> None:
        """Write a record to the log and the trackers."""
        if self._log is not None:
            self._log.write(record)
        for tracker in self._trackers:
            tracker.write(record)

    @property
    def records(self) -> Sequence[Record]:
        """Return what the log says so far; nothing in a process that does not lead."""
        return () if self._log is None else self._log.records()

    def warning(self, text: str) -> None:
        """Write one line for people to standard error."""
        if self._bar is not None:
            self._bar.say(text)
        elif self._log is not None:
            self._log.say(text)

    def sync(self) -> None:
        """Flush what was written to the disk: the checkpoint that follows relies on it."""
        if self._log is not None:
            self._log.sync()
        for tracker in self._trackers:
            tracker.sync()

    def draw(self) -> None:
        """Draw `loss.png` beside the log, where matplotlib is installed."""
        if self._log is None or not self._plot:
            return
        if find_spec("matplotlib") is None:
            self.warning(
                "loss.png is not drawn, as matplotlib is not installed: pip install "
                "'lapilli[train]', or set run.plot = false"
            )
            return
        records, folder = self._log.records(), self._log.path.parent
        if curve := loss_curve(records):
            name = folder.resolve().name
            held_out = {name: loss_curve(records, "eval_loss")}
            plot_losses({name: curve}, folder / "loss.png", evaluations=held_out)

    def close(self, *, finished: bool) -> None:
        """End bar and trackers; `finished`: the run reached its last step."""
        if self._bar is not None:
            self._bar.close()
        for tracker in self._trackers:
            tracker.close(finished=finished)


@contextmanager
def open_metrics_logger(
    recipe: TrainerRecipe,
    folder: Path,
    span: tuple[int, int],
    *,
    parallel: ParallelContext,
    echo: bool,
    progress: bool,
) -> Iterator[MetricsLogger]:
    """Open the logger of the steps `span` (done, of all); later records of an earlier run go.

    Raises:
        ConfigError: a tracker that the recipe asks for is not installed.
    """
    if not parallel.is_main_process:
        yield MetricsLogger()
        return
    first, steps = span
    log = RunLog(folder, echo=echo)
    log.rewind(first)
    trackers = open_trackers(recipe, folder, first)
    bar = ProgressBar(first, steps, recipe.stage) if progress else None
    logger = MetricsLogger(log, trackers, bar=bar, plot=recipe.run.plot)
    finished = False
    try:
        yield logger
        finished = True
    finally:
        logger.close(finished=finished)


RISEN: Final = "loss_risen_to"
LOWEST: Final = "loss_was"
_MOST: Final = 10  # losses of a mean
_FEWEST: Final = 3
_RISE: Final = 1.0  # e times as unlikely a token: more than any good run takes back
_SIGMAS: Final = 6.0
_LARGE, _LARGEST = 1.5, 4.0
_TIMES = 20.0


class LossWatch:
    """A detector of a loss that has risen, which tells it once.

    Short runs are judged by fewer losses; `records` are of the log of an earlier part of the run.
    """

    def __init__(self, steps: int, records: Sequence[Record] = ()) -> None:
        self._window = min(_MOST, max(_FEWEST, steps // 4))
        self._losses: deque[float] = deque(maxlen=self._window)
        self._lowest: float | None = None
        self._is_alone = True  # the lowest is the first loss, not a mean
        self._jumps, self._count = 0.0, 0
        self._is_told = any(RISEN in record for record in records)
        for record in records:
            if "loss" in record:
                self.push(record["loss"])

    def push(self, loss: float) -> tuple[float, float] | None:
        """Take in a loss; return lowest and present mean when it has risen for the first time."""
        if self._losses:
            self._jumps += (loss - self._losses[-1]) ** 2 / 2
            self._count += 1
        self._losses.append(loss)
        if self._lowest is None:
            self._lowest = loss
        if len(self._losses) < self._window:
            return None
        mean = fmean(self._losses)
        if mean < self._lowest:
            self._lowest, self._is_alone = mean, False
            return None
        # Half the mean square of the jumps is the variance of losses without their trend.
        losses = 1 / self._window + (1.0 if self._is_alone else 1 / self._window)
        noise = sqrt(self._jumps / self._count * losses)
        # Losses that diverge jump about as well, so that a large rise is believed without this.
        is_large = mean - self._lowest > _LARGE and (
            mean > _TIMES * self._lowest or mean - self._lowest > _LARGEST
        )
        is_clear = mean - self._lowest > max(_RISE, _SIGMAS * noise)
        if self._is_told or not (is_large or is_clear):
            return None
        self._is_told = True
        return self._lowest, mean


def rise_record(step: int, rise: tuple[float, float]) -> Record:
    """Return the log's record of a rise."""
    return {"step": step, LOWEST: rise[0], RISEN: rise[1]}


def advice(records: Sequence[Record], lr: float) -> str | None:
    """Return one sentence about the rise that a log tells of; None where there is none.

    `lr` is the largest learning rate of the run.
    """
    found = next((record for record in records if RISEN in record), None)
    if found is None:
        return None
    return (
        f"the loss rose from {found[LOWEST]:.2f} to {found[RISEN]:.2f} by step {found['step']}: "
        f"the learning rate of {lr:g} is likely too large. Begin again in another folder with a "
        f"smaller one (optim.lr = {lr / 10:.1g}), or with a longer optim.warmup_ratio"
    )


Curve = Sequence[tuple[int | float, float]]


def plot_losses(
    curves: Mapping[str, Curve],
    path: Path,
    *,
    evaluations: Mapping[str, Curve] | None = None,
) -> None:
    """Draw one panel per run, loss over steps, as PNG.

    `curves` are (step, loss) pairs by name of the run; `evaluations` are those of held-out data.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), place + 1)
        axes.plot([step for step, _ in curve], [loss for _, loss in curve], linewidth=1.0)
        if held_out := (evaluations or {}).get(name):
            steps, losses = zip(*held_out, strict=True)
            axes.plot(steps, losses, marker="o", markersize=3.0, linewidth=1.0, label="held out")
            axes.legend(fontsize=7)
        if all(loss > 0 for _, loss in curve):
            axes.set_yscale("log")
        title = name.encode(errors="replace").decode()  # a folder may be called \xff, or $a_b_c$
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_xlabel("step", fontsize=8)
        if place == 0:
            axes.set_ylabel("loss", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=120)


def loss_curve(records: Sequence[Record], key: str = "loss") -> list[tuple[int | float, float]]:
    """Return (step, loss) of the log records that have a loss of this name."""
    return [(record["step"], record[key]) for record in records if key in record]
