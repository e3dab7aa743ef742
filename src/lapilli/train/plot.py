"""The loss curves of runs as a picture; the only file of the trainer that imports matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lapilli.train.log import Record

Curve = Sequence[tuple[int | float, float]]


def plot_losses(curves: Mapping[str, Curve], path: Path) -> None:
    """One panel per run, loss over steps, as PNG.

    Args:
        curves: (step, loss) pairs by name of the run.
        path: where the picture goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), place + 1)
        axes.plot([step for step, _ in curve], [loss for _, loss in curve], linewidth=1.0)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        if place == 0:
            axes.set_ylabel("loss", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=120)


def loss_curve(records: Sequence[Record]) -> list[tuple[int | float, float]]:
    """(step, loss) of the log records that have a loss."""
    return [(record["step"], record["loss"]) for record in records if "loss" in record]
