"""Training loop: logged, saved, evaluated, and resumable to the bit; knows no data and no model.

    task.batch(step, i) -> batch          a function of the seed, the step and the micro-batch alone
    task.loss(batch)    -> sum, count     the loop divides by what the whole step supervises
    folder/state.pt                       weights, moments, averages, step: state.py
    folder/log.jsonl, best.pt, loss.png   what happened, the best weights, the curve

    prefetched batches -> step -> average -> log -> evaluate, best -> save -> asked to stop?

The order of samples being a function of the step, a run that is killed and started again makes the
same weights. What is written last is the state: whatever a kill interrupts is done again.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch

from lapilli.errors import ConfigError
from lapilli.train.distributed import SINGLE_PROCESS, ParallelContext
from lapilli.train.recipe import RunRecipe, TrainerRecipe
from lapilli.train.trainer.metrics import (
    LossWatch,
    MetricsLogger,
    advice,
    open_metrics_logger,
    peak_memory,
    rise_record,
)
from lapilli.train.trainer.optim import Average, build_optimizer, lr_share, set_lr
from lapilli.train.trainer.prefetch import MakeBatch, batches
from lapilli.train.trainer.state import (
    load_best,
    load_state,
    read_best,
    save_best,
    save_state,
)
from lapilli.train.trainer.step import (
    NotFiniteError,
    StepRecord,
    device_of,
    precision,
    stopped_at,
    take_step,
)
from lapilli.train.trainer.task import Best, Loss, RunState, Task, TrainingError

__all__ = ["Loss", "Stopped", "Task", "TrainingError", "number_of_steps", "train"]

OnSave = Callable[[int], None]
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def train(
    task: Task,
    recipe: TrainerRecipe,
    folder: Path,
    *,
    parallel: ParallelContext = SINGLE_PROCESS,
    echo: bool = False,
    progress: bool = False,
    on_save: OnSave | None = None,
) -> None:
    """Run the recipe to its last step, from the checkpoint in `folder` when there is one.

    At the end the model has the weights to keep: the best with run.keep_best, else the averages
    with optim.ema, else the last.

    `on_save` is called in every process after each checkpoint, with the number of steps done; the
    model has its averages then, where the run keeps them. `echo` writes log lines to stderr,
    `progress` a progress bar.

    Raises:
        TrainingError: the loss or the gradient is not finite (the batch is kept in
            `folder/bad_batch.pt`), a worker died, or the disk is full; the checkpoint is whole. Or
            the checkpoint in `folder` is of another run.
        ConfigError: the recipe does not go with the task or the processes.
        Stopped: SIGTERM (143) or SIGINT (130) came; the state is saved. A SystemExit.
    """
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    steps = number_of_steps(task, recipe.run)
    micros = parallel.micro_batches(recipe.run.gradient_accumulation_steps)
    folder.mkdir(parents=True, exist_ok=True)
    average = Average(task.model, recipe.optim.ema) if recipe.optim.ema else None
    find = getattr(task, "fingerprint", None)
    fingerprint = None if find is None else find()
    optimizer = build_optimizer(task.model, recipe.optim)
    state = RunState(task.model, optimizer, average, fingerprint=fingerprint)
    load_state(state, folder, parallel)
    if state.best is not None and recipe.run.keep_best:
        read_best(state, folder)  # one that cannot be used is told before the steps, not after them
    if state.step > steps:
        raise ConfigError(
            f"the run in {folder} has done {state.step} steps, and this recipe has {steps}: give "
            "another folder, or as many steps as are done"
        )
    with open_metrics_logger(
        recipe, folder, (state.step, steps), parallel=parallel, echo=echo, progress=progress
    ) as logger:
        watch = LossWatch(steps, logger.records)
        _Run(task, recipe, folder, parallel, micros, state, steps, logger, on_save, watch).go()
        logger.draw()
    if state.best is not None and recipe.run.keep_best:
        load_best(state, folder)
    elif average is not None:
        average.put_into_model()


class Stopped(SystemExit):
    """A run that ends because a signal asked for it, its state saved; `message` is for a person."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)  # as a shell reports it: POSIX.1-2017, Shell 2.8.2
        self.message = message


@contextmanager
def catch_signals() -> Iterator[list[signal.Signals]]:
    """Note the first SIGTERM or SIGINT in the list that is yielded, instead of dying of it.

    The second one does what it always did, so that nobody waits for a step that hangs. Outside of
    the main thread nothing is caught: Python has no handlers there.
    """
    seen: list[signal.Signals] = []
    earlier: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while earlier:
            signal.signal(*earlier.popitem())

    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(signal.Signals(number))
        restore()

    if threading.current_thread() is threading.main_thread():
        earlier |= {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield seen
    finally:
        restore()


def number_of_steps(task: Task, run: RunRecipe) -> int:
    """Return the optimizer steps of a run; the last one of an epoch is filled from the next.

    Raises:
        ConfigError: neither the recipe nor the task knows.
    """
    if run.steps:
        return run.steps
    num_samples: int | None = getattr(task, "num_samples", None)
    if num_samples is None:
        raise ConfigError(
            "run.steps is 0 and this task does not know how many samples an epoch has: set "
            "run.steps"
        )
    # Rounded: 0.1 epochs of 30 samples are not a little more than 3.
    return ceil(
        round(run.epochs * num_samples / (run.batch_size * run.gradient_accumulation_steps), 6)
    )


@dataclass(slots=True)
class _Run:
    """The steps that are left, and what is written beside them."""

    task: Task
    recipe: TrainerRecipe
    folder: Path
    parallel: ParallelContext
    micros: range  # the micro-batches of a step that this process reads
    state: RunState
    steps: int
    logger: MetricsLogger
    on_save: OnSave | None
    losses: LossWatch
    saved: Path | None = None
    count: int = 0  # supervised things since the last line of the log, and the seconds of their
    seconds: float = 0.0  # steps alone: saving and evaluating are not part of the speed

    def go(self) -> None:
        run, first = self.recipe.run, self.state.step
        places = ((step, micro) for step in range(first, self.steps) for micro in self.micros)
        ahead = batches(self.task.batch, places, run.workers, describe=self._describe)
        with catch_signals() as seen, ahead as make:
            while self.state.step < self.steps:
                started = time.monotonic()
                record = self._step(make, lambda: bool(seen))
                self.count += record.count
                self.seconds += time.monotonic() - started
                is_saved = self._write(record)
                if record.stop:
                    if not is_saved:
                        self._save()
                    raise self._stopped(seen)

    def _describe(self, step: int, micro: int) -> str:
        """Return place and id of the samples of a micro-batch."""
        names = getattr(self.task, "names", None)
        return "" if names is None else ", ".join(names(step, micro))

    def _stopped(self, seen: list[signal.Signals]) -> Stopped:
        """Return the end that a signal to this process, or to another one, has asked for."""
        asked = seen[0].name if seen else "a signal to another process"
        return Stopped(
            seen[0] if seen else signal.SIGTERM,
            f"stopped by {asked} after step {self.state.step} of {self.steps}: the state is in "
            f"{self.saved}; the same command goes on from there",
        )

    def _step(self, make: MakeBatch, asked_to_stop: Callable[[], bool]) -> StepRecord:
        step, optim = self.state.step, self.recipe.optim
        made = {micro: make(step, micro) for micro in self.micros}
        share = lr_share(step, self.steps, optim)
        set_lr(self.state.optimizer, share)
        try:
            record = take_step(
                self.task,
                self.state.optimizer,
                self.recipe,
                made,
                step=step,
                parallel=self.parallel,
                asked_to_stop=asked_to_stop,
            )
        except NotFiniteError as error:
            raise stopped_at(error, step, self.folder, self.parallel) from error
        self.state.step = step + 1
        if self.state.average is not None:
            self.state.average.update(self.state.step)
        self.state.skipped += record.skipped
        record.metrics["lr"] = optim.lr * share
        if self.state.skipped:
            record.metrics["skipped"] = self.state.skipped
        return record

    def _write(self, record: StepRecord) -> bool:
        """Log, evaluate and save, as far as it is due; return whether the state is saved."""
        run, done = self.recipe.run, self.state.step
        is_last = done == self.steps
        metrics = {"step": done, **record.metrics}
        memory = round(peak_memory(device_of(self.task.model)) / 2**30, 2)
        self.logger.tick({**metrics, "gib": memory}, record.count)
        if done % run.log_every == 0 or is_last:
            speed = round(self.count / max(self.seconds, 1e-9), 1)
            self.count, self.seconds = 0, 0.0
            self.logger.write({**metrics, "per_s": speed, "gib": memory})
        if rise := self.losses.push(record.metrics["loss"]):
            told = rise_record(done, rise)
            self.logger.write(told)
            lr = max(group["base_lr"] for group in self.state.optimizer.param_groups)
            if text := advice([told], lr):
                self.logger.warning(text)
        if is_last or (run.evaluate_every and done % run.evaluate_every == 0):
            found = evaluate(self.task, self.recipe, self.state.average)
            if found:
                self.logger.write({"step": done, **found})
            if run.keep_best:
                keep_best(self.state, found, self.folder, self.parallel)
        is_due = done % run.save_every == 0 or is_last
        if is_due:
            self._save()
        return is_due

    def _save(self) -> None:
        self.logger.sync()
        self.saved = save_state(self.state, self.folder, self.parallel)
        if self.on_save is not None:
            average = self.state.average
            with nullcontext() if average is None else average.in_place():
                self.on_save(self.state.step)


EVAL_LOSS: Final = "eval_loss"


def evaluate(
    task: Task, recipe: TrainerRecipe, average: Average | None = None
) -> Mapping[str, float]:
    """Return the task's metrics in evaluation mode, with the averages where the run has them."""
    task.model.eval()
    try:
        weights = nullcontext() if average is None else average.in_place()
        with torch.no_grad(), weights, precision(task.model, recipe):
            return task.evaluate()
    finally:
        task.model.train()


def keep_best(
    state: RunState, metrics: Mapping[str, float], folder: Path, parallel: ParallelContext
) -> None:
    """Write the weights of this step where no earlier evaluation had a lower loss.

    Raises:
        ConfigError: the task does not say what its loss is.
    """
    if EVAL_LOSS not in metrics:
        raise ConfigError(
            f"run.keep_best needs {EVAL_LOSS}, and the evaluation gave "
            f"{sorted(metrics) or 'nothing'}: set data.held_out or data.evaluation"
        )
    # The processes may differ in the last bit; all of them have to write or none.
    found = parallel.sum_floats(
        {EVAL_LOSS: float(metrics[EVAL_LOSS]) if parallel.is_main_process else 0.0}
    )[EVAL_LOSS]
    least = math.inf if state.best is None else state.best.eval_loss
    if found < least:  # never, where it is not a number
        state.best = Best(state.step, found)
        save_best(state, folder, parallel)
