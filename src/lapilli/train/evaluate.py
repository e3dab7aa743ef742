"""Figures on held-out data while a run goes on, and the weights that did best; no loop."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import torch

from lapilli.errors import ConfigError
from lapilli.train.distributed import Team
from lapilli.train.ema import Average
from lapilli.train.recipe import TrainerRecipe
from lapilli.train.trainer.contract import Task
from lapilli.train.trainer.state import Best, RunState, save_best
from lapilli.train.trainer.step import precision

FIGURE: Final = "eval_loss"


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
    if FIGURE not in figures:
        raise ConfigError(
            f"run.keep_best needs {FIGURE}, and the evaluation gave {sorted(figures) or 'nothing'}:"
            " set data.held_out or data.evaluation"
        )
    # The processes may differ in the last bit; all of them have to write or none.
    found = team.sum_floats({FIGURE: float(figures[FIGURE]) if team.leads else 0.0})[FIGURE]
    least = math.inf if state.best is None else state.best.eval_loss
    if found < least:  # never, where it is not a number
        state.best = Best(state.step, found)
        save_best(state, folder, team)
