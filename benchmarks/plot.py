"""The plot of a run: bars per engine above, growth below."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.contest import ENGINES
from benchmarks.summary import figures_of_format

COLOURS = {
    "lapilli": "#1b6ca8",
    "llama.cpp": "#c8553d",
    "ik_llama.cpp": "#d99a2b",
    "transformers": "#8a8d91",
}
OTHER = "#5b8c5a"
BARS = (
    ("first_s", "first token, s (less is better)"),
    ("tokens_per_s", "decoding, tokens/s"),
    ("many_tokens_per_s", "8 at once, tokens/s"),
)
QUALITY = (
    ("tokens_per_s", "decoding, tokens/s"),
    ("prefill_tokens_per_s", "reading the prompt, tokens/s"),
)
LEAST_KL = 1e-4
"""Where engines stand that compute with the weights as they are: a logarithm has no zero."""
STYLE = {
    "svg.hashsalt": "lapilli",
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
}
GROWTH = (
    ("positions", "first_s", "positions", "first token, s"),
    ("positions", "tokens_per_s", "positions", "decoding, tokens/s"),
    ("batch", "tokens_per_s", "requests at the same time", "tokens/s of all"),
    ("pictures", "first_s", "pictures in one prompt", "first token, s"),
)


def colour(engine: str) -> str:
    """One per family of engines."""
    return next((shade for name, shade in COLOURS.items() if engine.startswith(name)), OTHER)


def draw(found: dict[str, Any], rows: dict[str, dict[str, float]], path: Path) -> None:
    """Write the plot; the same figures give the same bytes."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 7), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
        shape = found["settings"]["shape"]
        figure.suptitle(f"shape {shape}, {found['machine']['cpu']}, {found['date']}", fontsize=10)
        for axes, (key, title) in zip(above.subplots(1, 3, sharey=True), BARS, strict=True):
            _bars(axes, rows, key, title)
        for axes, (task, *labels) in zip(below.subplots(1, 4), GROWTH, strict=True):
            _lines(axes, found, task, labels)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def draw_quality(found: dict[str, Any], rows: dict[str, dict[str, float]], path: Path) -> None:
    """Write the plot of KL against speed: what is fast and good stands to the right and below."""
    with plt.rc_context(STYLE):
        figure, both = plt.subplots(1, 2, figsize=(12, 6.5), layout="constrained", sharey=True)
        shape = found["settings"]["shape"]
        figure.suptitle(f"shape {shape}, {found['machine']['cpu']}, {found['date']}", fontsize=10)
        for axes, (key, label) in zip(both, QUALITY, strict=True):
            for name, speed, kl in points(found, rows, key):
                axes.plot(speed, kl, "o", color=colour(name))
                # Neighbours have nearly the same KL: slanted names do not lie on each other.
                axes.annotate(
                    name.removesuffix(", text alone"),
                    (speed, kl),
                    (2, 4),
                    textcoords="offset points",
                    fontsize=6.5,
                    rotation=40,
                )
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.margins(x=0.15, y=0.15)
        both[0].set_ylabel(f"KL from float32, nats ({LEAST_KL:g}: weights not rounded)")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def points(
    found: dict[str, Any], rows: dict[str, dict[str, float]], key: str
) -> list[tuple[str, float, float]]:
    """Name, speed and KL of every engine that both are known of."""
    formats = found["quality"]["formats"]
    found_points = []
    for engine in ENGINES:
        known = figures_of_format(formats, engine.format) if engine.format else {"kl": LEAST_KL}
        speed = rows.get(engine.name, {}).get(key)
        if known is not None and speed is not None:
            found_points.append((engine.name, speed, max(known["kl"], LEAST_KL)))
    return found_points


def _bars(axes: Axes, rows: dict[str, dict[str, float]], key: str, title: str) -> None:
    names = [engine.name for engine in reversed(ENGINES) if engine.name in rows]
    values = [rows[name].get(key, 0.0) for name in names]
    bars = axes.barh(names, values, color=[colour(name) for name in names])
    labels = [f"{value:.3g}" if value else "" for value in values]
    axes.bar_label(bars, labels=labels, padding=2, fontsize=8)
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=9)


def _lines(axes: Axes, found: dict[str, Any], task: str, labels: list[str]) -> None:
    key, x_label, y_label = labels
    for name, figures in found["done"].items():
        if name.startswith(f"{task}/"):
            engine = name.split("/")[1]
            points = [(int(at), one[key]) for at, one in figures["points"].items() if key in one]
            axes.plot(*zip(*points, strict=True), "o-", color=colour(engine), label=engine)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    if axes.has_data():
        axes.legend(fontsize=7)
