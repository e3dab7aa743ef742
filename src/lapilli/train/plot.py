"""The loss curves of runs as a picture; the only file of the trainer that imports matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lapilli.train.trainer.metrics import Record

Curve = Sequence[tuple[int | float, float]]


def plot_losses(
    curves: Mapping[str, Curve],
    path: Path,
    *,
    evaluations: Mapping[str, Curve] | None = None,
) -> None:
    """One panel per run, loss over steps, as PNG.

    Args:
        curves: (step, loss) pairs by name of the run.
        path: where the picture goes.
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
    """(step, loss) of the log records that have a loss."""
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def evaluation_curve(records: Sequence[Record]) -> list[tuple[int | float, float]]:
    """(step, loss) of the evaluations that have a loss."""
    return [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
