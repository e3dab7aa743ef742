"""docs/quantization.md and its plot, of what benchmarks/quantization.py found.

python -m benchmarks.quantization_report
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.machine import RESULTS
from benchmarks.plot import STYLE

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PLOT = DOCS / "quantization.md", DOCS / "assets" / "quantization.svg"
FLOAT = "float32"
MODELS = {
    "pebble": "pebble",
    "larger": "pebble's larger sibling",
    "text": "SmolLM2-135M",
}
COLOURS = {
    "nearest": "#8a8d91",
    "gptq": "#1b6ca8",
    "awq": "#c8553d",
    "awq-clip": "#8e5aa8",
    "mbq": "#5b8c5a",
    "GGUF": "#d99a2b",
}
HEAD = """# What quantization costs

Measured by `python -m benchmarks.quantization`, written by
`python -m benchmarks.quantization_report` from [its
result](../benchmarks/results/quantization.json). [Four and eight bits](guide/quantize.md) says what
the methods do and which to choose.

`W4A8` means weights in 4 bits and activations that are rounded to 8 on the fly, which is what the
CPU kernels compute by default; `A16` leaves activations as they are. *nonlinear* is lapilli's own
format, *zeros* has scales and zero points for groups of 32, 64 or 128 weights, as AWQ files have
them. *nearest* is plain rounding. Bits are those of a weight in the linear layers of the decoder,
scales included; 3 bits lie in the layout of 4 and are here to see what they would cost. KL is the
divergence of the next token's distribution from float32's, in nats.

*awq* and *mbq* round the scaled weights in turn, as *gptq* does. *awq-clip* is AWQ as published,
which clips weights and rounds each to its nearest level: that lowers the error of every layer, and
yet the KL of some of its rows is above that of *nearest*.
"""


def gguf_rows() -> dict[str, dict[str, Any]]:
    """Return what quality.py measured of GGUF formats on the same text and weights."""
    found = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["formats"]
    kept = ("Q4_0", "Q4_K_S", "Q4_K_M", "IQ4_KS", "IQ4_K", "Q8_0")
    rows = {}
    for name, row in found.items():
        maker, _, kind = name.rpartition(" ")
        if maker in ("llama.cpp", "ik_llama.cpp") and kind in kept:
            rows[f"GGUF {kind} ({maker})"] = row
    return rows


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [HEAD]
    for model, title in MODELS.items():
        rows = found["models"].get(model)
        if rows:
            table = _text_table(rows) if model == "text" else _seeing_table(rows)
            parts.append(f"\n## {title}\n\n{_about(model, found)}\n\n{table}")
    if "speeds" in found:
        parts.append(f"\n## Speed\n\n{_speed_table(found['speeds'])}")
    parts.append("\n## KL against bits\n\n![KL against bits](assets/quantization.svg)\n")
    return "".join(parts)


_ABOUT_TEXT = """The model of `benchmarks/quality.py`: real weights, trained a little so that they
lie on no format's levels; 4,080 positions of held-out text. Calibrated on {samples} blocks of 512
tokens of what it was trained on. GGUF files are made and run by llama.cpp and ik_llama.cpp."""
_ABOUT_EXAM = """Exact answers of {questions:,} questions in percent, all and by skill; *same* are
answers that are float32's word for word. Calibrated on {samples} conversations about pictures;
*text* leaves the pictures out. GGUF rows are rounded by llama.cpp and computed in floats."""


_ABOUT_LARGER = """

Read this table with care: most of what the sibling can do still stands in pebble's part of it. The
layers that it grew add a few hundredths to what the old ones compute ([A larger
sibling](guide/pebble.md#a-larger-sibling)), so errors in them change little, and a model whose
layers all work may lose more by quantization than this one does."""


def _about(model: str, found: Mapping[str, Any]) -> str:
    text = _ABOUT_TEXT if model == "text" else _ABOUT_EXAM
    questions = found.get("questions", {}).get(model, 0)
    text += _ABOUT_LARGER if model == "larger" else ""
    return text.format(questions=questions, samples=found["samples"][model])


def _seeing_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    skills = [skill for skill in rows[FLOAT]["skills"] if skill != "all"]
    lines = [
        f"| | bits | KL | same | all | {' | '.join(skills)} |",
        f"|---|{'---|' * (len(skills) + 4)}",
    ]
    for key, row in rows.items():
        shares = [f"{100 * row['skills'][skill]:.1f}" for skill in ("all", *skills)]
        if key == FLOAT:
            lines.append(f"| {key} | 32 | | | {' | '.join(shares)} |")
        else:
            same = f"{100 * row['same answers']:.1f}"
            cells = [f"{row['bits']:.2f}", f"{row['kl']:.5f}", same, *shares]
            lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _text_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| | bits | KL | same first choice | perplexity |", "|---|---|---|---|---|"]
    for key, row in {**rows, **gguf_rows()}.items():
        if key == FLOAT:
            lines.append(f"| {key} | 32 | | | {row['perplexity']:.2f} |")
            continue
        cells = (f"{row['bits']:.2f}", f"{row['kl']:.4f}", f"{100 * row['same']:.1f} %")
        lines.append(f"| {key} | {' | '.join(cells)} | {row['perplexity']:.2f} |")
    return "\n".join(lines) + "\n"


def _speed_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return size and speed of the formats, as ratios to the default's too."""
    own = rows["W4A8 nonlinear"]
    lines = [
        "SmolLM2-135M on two cores: new tokens after 512 positions, and the prompt of 512. Which",
        "method chose the integers makes no difference. Read the ratios, to `W4A8 nonlinear`.",
        "",
        "| | MB | new tokens/s | ratio | prompt tokens/s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        decode, prompt = (row[key] / own[key] for key in ("decode", "prompt"))
        cells = [f"{row['MB']:.0f}", f"{row['decode']:.0f}", f"{decode:.2f}"]
        cells += [f"{row['prompt']:.0f}", f"{prompt:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _points(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float, float, bool]]:
    """Yield method, bits, KL and whether activations are rounded, of every row in 3 or 4 bits."""
    for key, row in rows.items():
        if "kl" not in row or row["bits"] > 6:
            continue
        if key.startswith("GGUF"):
            yield "GGUF", row["bits"], row["kl"], False
        else:
            form, _, name = key.partition(", ")
            bits = row["bits"] - 1 if form.startswith("W3") else row["bits"]
            yield name.split(",")[0], bits, row["kl"], "A8" in form


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write the plot; the same figures give the same bytes."""
    models = [model for model in MODELS if found["models"].get(model)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(models), figsize=(4.6 * len(models), 3.8), layout="constrained", squeeze=False
        )
        for axis, model in zip(axes[0], models, strict=True):
            rows = dict(found["models"][model])
            _scatter(axis, rows | (gguf_rows() if model == "text" else {}))
            axis.set_title(MODELS[model])
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _scatter(axis: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    named: set[str] = set()
    for method, bits, kl, is_rounded in _points(rows):
        label = None if method in named else method
        named.add(method)
        shape = "o" if is_rounded else "^"
        colour = COLOURS.get(method, "#444444")
        axis.scatter(bits, max(kl, 1e-6), c=colour, marker=shape, s=28, label=label)
    axis.set_yscale("log")
    axis.set_xlabel("bits of a weight (3-bit rows as if packed); o A8, ^ A16")
    axis.set_ylabel("KL from float32, nats")
    axis.legend(fontsize=8)


def main(arguments: Sequence[str] = ()) -> None:
    """Write page and plot."""
    del arguments
    found = json.loads((RESULTS / "quantization.json").read_text(encoding="utf-8"))
    PAGE.write_text(page(found), encoding="utf-8")
    draw(found, PLOT)


if __name__ == "__main__":
    main()
