"""Loss curve: a warning where the loss rises instead of falling, and its picture.

    mean of the latest losses  >  lowest mean so far + 1 + noise  ->  the learning rate is too large

A loss that is infinite or no number ends a run (step.py); one that rises only does not. The only
file of the trainer that imports matplotlib.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Final

from lapilli.train.trainer.contract import Record

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

    Args:
        steps: of the run; short ones are judged by fewer losses.
        records: of the log of an earlier part of the run: what is known from it.
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

    Args:
        records: of the log.
        lr: the largest learning rate of the run.
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

    Args:
        curves: (step, loss) pairs by name of the run.
        path: of the picture.
        evaluations: the same of held-out data, for the runs that have them.
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
        axes.set_title(name, fontsize=9, parse_math=False)  # a folder may be called $a_b_c$
        axes.set_xlabel("step", fontsize=8)
        if place == 0:
            axes.set_ylabel("loss", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=120)


def loss_curve(records: Sequence[Record]) -> list[tuple[int | float, float]]:
    """Return (step, loss) of the log records that have a loss."""
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def evaluation_curve(records: Sequence[Record]) -> list[tuple[int | float, float]]:
    """Return (step, loss) of the evaluations that have a loss."""
    return [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
