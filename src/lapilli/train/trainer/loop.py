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
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Final

import torch

from lapilli.errors import ConfigError
from lapilli.train.distributed import ALONE, Team
from lapilli.train.recipe import RunRecipe, TrainerRecipe
from lapilli.train.trainer.contract import (
    CountedTask,
    IdentifiedTask,
    Loss,
    NamingTask,
    Task,
    TrainingError,
)
from lapilli.train.trainer.curves import LossWatch, advice, rise_record
from lapilli.train.trainer.metrics import Journal, open_journal, peak_memory
from lapilli.train.trainer.optim import Average, build_optimizer, lr_share, peak_lrs, set_lr
from lapilli.train.trainer.prefetch import MakeBatch, batches
from lapilli.train.trainer.signals import Stopped, StopWatch
from lapilli.train.trainer.state import (
    Best,
    RunState,
    load_best,
    load_state,
    read_best,
    save_best,
    save_state,
)
from lapilli.train.trainer.step import (
    Moment,
    NotFiniteError,
    StepRecord,
    device_of,
    precision,
    stopped_at,
    take_step,
)

__all__ = ["Loss", "Stopped", "Task", "TrainingError", "number_of_steps", "train"]

OnSave = Callable[[int], None]


def train(
    task: Task,
    recipe: TrainerRecipe,
    folder: Path,
    *,
    team: Team = ALONE,
    echo: bool = False,
    progress: bool = False,
    on_save: OnSave | None = None,
) -> None:
    """Run the recipe to its last step, from the checkpoint in `folder` when there is one.

    At the end the model has the weights to keep: the best with run.keep_best, else the averages
    with optim.ema, else the last.

    Args:
        task: what is trained on what.
        recipe: how.
        folder: where everything goes.
        team: this process among all.
        echo: log lines on stderr.
        progress: a progress bar on stderr.
        on_save: called in every process after each checkpoint, with the number of steps done; the
            model has its averages then, where the run keeps them.

    Raises:
        TrainingError: the loss or the gradient is not finite (the batch is kept in
            `folder/bad_batch.pt`), a worker died, or the disk is full; the checkpoint is whole. Or
            the checkpoint in `folder` is of another run.
        ConfigError: the recipe does not go with the task or the team.
        Stopped: SIGTERM (143) or SIGINT (130) came; the state is saved. A SystemExit.
    """
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    steps = number_of_steps(task, recipe.run)
    _check(recipe.run, team)
    folder.mkdir(parents=True, exist_ok=True)
    average = Average(task.model, recipe.optim.ema) if recipe.optim.ema else None
    identity = task.identity() if isinstance(task, IdentifiedTask) else None
    optimizer = build_optimizer(task.model, recipe.optim)
    state = RunState(task.model, optimizer, average, identity=identity)
    load_state(state, folder, team)
    if state.best is not None and recipe.run.keep_best:
        read_best(state, folder)  # one that cannot be used is told before the steps, not after them
    if state.step > steps:
        raise ConfigError(
            f"the run in {folder} has done {state.step} steps, and this recipe has {steps}: give "
            "another folder, or as many steps as are done"
        )
    with open_journal(
        recipe, folder, (state.step, steps), team=team, echo=echo, progress=progress
    ) as journal:
        watch = LossWatch(steps, journal.records)
        _Run(task, recipe, folder, team, state, steps, journal, on_save, watch).go()
        journal.draw()
    if state.best is not None and recipe.run.keep_best:
        load_best(state, folder)
    elif average is not None:
        average.put_into_model()


def number_of_steps(task: Task, run: RunRecipe) -> int:
    """Optimizer steps of a run; the last one of an epoch is filled from the next.

    Raises:
        ConfigError: neither the recipe nor the task knows.
    """
    if run.steps:
        return run.steps
    if not isinstance(task, CountedTask):
        raise ConfigError(
            "run.steps is 0 and this task does not know how many samples an epoch has: set "
            "run.steps"
        )
    # Rounded: 0.1 epochs of 30 samples are not a little more than 3.
    return ceil(
        round(run.epochs * task.num_samples / (run.batch_size * run.gradient_accumulation_steps), 6)
    )


def _check(run: RunRecipe, team: Team) -> None:
    if (number := run.gradient_accumulation_steps) < team.size:
        raise ConfigError(
            f"run.gradient_accumulation_steps is {number} and {team.size} processes train: each of "
            f"them needs a micro-batch of every step, so start {number} processes at most, or "
            f"begin a run with run.gradient_accumulation_steps set to {team.size} or more"
        )


@dataclass(slots=True)
class _Pace:
    """Supervised things a second, of the steps alone: saving and evaluating do not count."""

    count: int = 0
    seconds: float = 0.0

    def add(self, count: int, seconds: float) -> None:
        self.count += count
        self.seconds += seconds

    def take(self) -> float:
        speed = self.count / max(self.seconds, 1e-9)
        self.count, self.seconds = 0, 0.0
        return round(speed, 1)


@dataclass(slots=True)
class _Run:
    """The steps that are left, and what is written beside them."""

    task: Task
    recipe: TrainerRecipe
    folder: Path
    team: Team
    state: RunState
    steps: int
    journal: Journal
    on_save: OnSave | None
    losses: LossWatch
    pace: _Pace = field(default_factory=_Pace)
    saved: Path | None = None

    def go(self) -> None:
        run, first = self.recipe.run, self.state.step
        own = self.team.own(run.gradient_accumulation_steps)
        places = ((step, micro) for step in range(first, self.steps) for micro in own)
        ahead = batches(self.task.batch, places, run.workers, describe=self._describe)
        with StopWatch() as watch, ahead as make:
            while self.state.step < self.steps:
                started = time.monotonic()
                record = self._step(make, watch)
                self.pace.add(record.count, time.monotonic() - started)
                is_saved = self._write(record)
                if record.stop:
                    if not is_saved:
                        self._save()
                    raise self._stopped(watch.seen)

    def _describe(self, step: int, micro: int) -> str:
        """The samples of a micro-batch, by place and id."""
        return ", ".join(self.task.names(step, micro)) if isinstance(self.task, NamingTask) else ""

    def _stopped(self, seen: signal.Signals | None) -> Stopped:
        """The end that was asked for: of this process, or of another one."""
        asked = "a signal to another process" if seen is None else seen.name
        return Stopped(
            seen or signal.SIGTERM,
            f"stopped by {asked} after step {self.state.step} of {self.steps}: the state is in "
            f"{self.saved}; the same command goes on from there",
        )

    def _step(self, make: MakeBatch, watch: StopWatch) -> StepRecord:
        step, optim = self.state.step, self.recipe.optim
        made = {
            micro: make(step, micro)
            for micro in self.team.own(self.recipe.run.gradient_accumulation_steps)
        }
        share = lr_share(step, self.steps, optim)
        set_lr(self.state.optimizer, share)
        try:
            record = take_step(
                self.task,
                self.state.optimizer,
                self.recipe,
                made,
                at=Moment(step, self.team, watch.asked),
            )
        except NotFiniteError as error:
            raise stopped_at(error, step, self.folder, self.team) from error
        self.state.step = step + 1
        if self.state.average is not None:
            self.state.average.update(self.state.step)
        self.state.skipped += record.skipped
        record.figures["lr"] = optim.lr * share
        if self.state.skipped:
            record.figures["skipped"] = self.state.skipped
        return record

    def _write(self, record: StepRecord) -> bool:
        """Log, evaluation and checkpoint, as far as they are due; whether the state is saved."""
        run, done = self.recipe.run, self.state.step
        is_last = done == self.steps
        figures = {"step": done, **record.figures}
        memory = round(peak_memory(device_of(self.task.model)) / 2**30, 2)
        self.journal.tick({**figures, "gib": memory}, record.count)
        if done % run.log_every == 0 or is_last:
            self.journal.write({**figures, "per_s": self.pace.take(), "gib": memory})
        if rise := self.losses.push(record.figures["loss"]):
            told = rise_record(done, rise)
            self.journal.write(told)
            if text := advice([told], max(peak_lrs(self.state.optimizer))):
                self.journal.warn(text)
        if is_last or (run.evaluate_every and done % run.evaluate_every == 0):
            found = evaluate(self.task, self.recipe, self.state.average)
            if found:
                self.journal.write({"step": done, **found})
            if run.keep_best:
                keep_best(self.state, found, self.folder, self.team)
        is_due = done % run.save_every == 0 or is_last
        if is_due:
            self._save()
        return is_due

    def _save(self) -> None:
        self.journal.sync()
        self.saved = save_state(self.state, self.folder, self.team)
        if self.on_save is not None:
            average = self.state.average
            with nullcontext() if average is None else average.in_place():
                self.on_save(self.state.step)


EVAL_LOSS: Final = "eval_loss"


def evaluate(
    task: Task, recipe: TrainerRecipe, average: Average | None = None
) -> Mapping[str, float]:
    """The task's figures with the model in evaluation mode, with its averages where it has them."""
    task.model.eval()
    try:
        weights = nullcontext() if average is None else average.in_place()
        with torch.no_grad(), weights, precision(task.model, recipe):
            return task.evaluate()
    finally:
        task.model.train()


def keep_best(state: RunState, figures: Mapping[str, float], folder: Path, team: Team) -> None:
    """Write the weights of this step where no earlier evaluation had a lower loss.

    Raises:
        ConfigError: the task does not say what its loss is.
    """
    if EVAL_LOSS not in figures:
        raise ConfigError(
            f"run.keep_best needs {EVAL_LOSS}, and the evaluation gave "
            f"{sorted(figures) or 'nothing'}: set data.held_out or data.evaluation"
        )
    # The processes may differ in the last bit; all of them have to write or none.
    found = team.sum_floats({EVAL_LOSS: float(figures[EVAL_LOSS]) if team.leads else 0.0})[
        EVAL_LOSS
    ]
    least = math.inf if state.best is None else state.best.eval_loss
    if found < least:  # never, where it is not a number
        state.best = Best(state.step, found)
        save_best(state, folder, team)
