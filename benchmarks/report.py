"""The report of a run: Markdown, JSON, and plots."""

import json
from pathlib import Path
from typing import Any

from benchmarks.contest import ENGINES, LOADING
from benchmarks.plot import draw, draw_quality
from benchmarks.summary import limits, medians, ratios, shares, spreads, work

HEAD = (
    "| engine | tower ms | first token s | prefill tokens/s | decode tokens/s "
    "| 8 at once tokens/s | with reading | second question s "
    "| of the first | peak GB | peak at 8 GB | imports s | load s |"
)
CELLS = (
    ("tower_s", 1e3, 0),
    ("first_s", 1, 2),
    ("prefill_tokens_per_s", 1, 0),
    ("tokens_per_s", 1, 1),
    ("many_tokens_per_s", 1, 1),
    ("many_whole_tokens_per_s", 1, 1),
    ("second_s", 1, 3),
    ("second_over_first", 1, 3),
    ("peak_bytes", 1e-9, 2),
    ("many_peak_bytes", 1e-9, 2),
    ("import_s", 1, 2),
    ("load_s", 1, 2),
)
GROWN = {
    "positions": "positions of text, prompt and 16 answer tokens together",
    "batch": "requests at the same time, 256 positions of their own each",
    "pictures": "pictures in one prompt",
}


def write_report(found: dict[str, Any], folder: Path, name: str) -> str:
    """Everything into files; returns the Markdown."""
    rows = medians(found)
    summary = {
        "engines": rows,
        "limits": limits(found),
        "work": work(found),
        "shares of the limits": shares(found, rows),
        "ratios": ratios(found, rows),
    }
    text = markdown(found, summary, name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found | {"summary": summary}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    draw(found, rows, folder / f"{name}.svg")
    if "quality" in found:
        draw_quality(found, rows, folder / f"{name}-quality.svg")
    return text


def markdown(found: dict[str, Any], summary: dict[str, Any], name: str) -> str:
    """The report as a page."""
    parts = [*_heading(found), "", *_table(summary["engines"]), ""]
    parts += [*_limits(summary), "", *_ratios(summary["ratios"]), "", *_spreads(found)]
    parts += ["", *_quality(found, name), *_growth(found), *_lookup(found), *_start(found)]
    parts += [f"![first token, decoding, growth]({name}.svg)", ""]
    left_out = found["skipped"] | found["failed"]
    parts += [f"- not measured: {key}: {why}" for key, why in left_out.items()]
    return "\n".join(parts).rstrip() + "\n"


def _heading(found: dict[str, Any]) -> list[str]:
    settings, machine = found["settings"], found["machine"]
    versions = {"torch": machine["torch"], "transformers": machine["transformers"]}
    versions |= {key: value for key, value in found["peers"].items() if value}
    listed = ", ".join(f"{key} {value}" for key, value in versions.items())
    features = " ".join(machine["features"])
    memory = machine["memory_bytes"] / 1e9
    return [
        f"# Inference, shape {settings['shape']}",
        "",
        f"{machine['cpu']} (family and model {machine['family and model']}; {features}), "
        f"{machine['cores']} cores, {memory:.0f} GB; {settings['threads']} threads. {listed}. "
        f"{found['date']}.",
        "",
        f"One new picture of 576 positions and 40 positions of text, {settings['new_tokens']} new "
        f"tokens, greedy. Medians of {found['rounds']} processes per engine, in turns.",
    ]


def _cell(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"


def _table(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    order = [engine.name for engine in (*ENGINES, LOADING)]
    for name in sorted(rows, key=lambda each: order.index(each) if each in order else 99):
        cells = [_cell(rows[name].get(key), factor, digits) for key, factor, digits in CELLS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _limits(summary: dict[str, Any]) -> list[str]:
    most, tasks = summary["limits"], summary["work"]
    if not most:
        return []
    lines = [
        f"The machine reads {most['bytes_per_s'] / 1e9:.1f} GB/s and multiplies "
        f"{most['float32_per_s'] / 1e9:.0f} GFLOP/s in float32, "
        f"{most['bfloat16_per_s'] / 1e9:.0f} in bfloat16, {most['int8_per_s'] / 1e9:.0f} GOP/s in "
        f"int8 (best kernels, same run). The prompt is {tasks['prompt_operations'] / 1e12:.2f} "
        f"TFLOP, the tower {tasks['tower_operations'] / 1e12:.2f}.",
        "",
        "| engine | decode, of the bandwidth | prefill, of the arithmetic | tower, of the floats |",
        "|---|---|---|---|",
    ]
    for name, one in summary["shares of the limits"].items():
        cells = [
            f"{100 * one[key]:.0f} %" if key in one else ""
            for key in ("decode", "prefill", "tower")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ratios(reached: list[dict[str, Any]]) -> list[str]:
    lines = ["| lapilli int4 | | target | met |", "|---|---|---|---|"]
    for one in reached:
        met = {True: "yes", False: "no", None: ""}[one["met"]]
        lines.append(f"| {one['figure']} | {one['value']:.2f} | {one['target'] or ''} | {met} |")
    return lines


def _spreads(found: dict[str, Any]) -> list[str]:
    first, decode = spreads(found, "first_s"), spreads(found, "tokens_per_s")
    listed = [
        f"{name} {first[name][0]:.2f} to {first[name][1]:.2f} s, "
        f"{decode[name][0]:.1f} to {decode[name][1]:.1f} tokens/s"
        for name in first
    ]
    return [f"Spread of the processes: {'; '.join(listed)}."] if listed else []


def _quality(found: dict[str, Any], name: str) -> list[str]:
    quality = found.get("quality")
    if not quality:
        return []
    lines = [
        f"Formats on SmolLM2-135M, trained off its grid and widened to 768 inputs (quality.py), "
        f"{quality['positions']} positions of text that it was not trained on; KL from float32 in "
        "nats, bits per weight of the layers, and with the head:",
        "",
        "| format | KL | error | first choice stays | perplexity | bits | with the head "
        "| greedy answers stay |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, one in sorted(quality["formats"].items(), key=lambda each: each[1]["kl"]):
        greedy = one.get("greedy answers equal")
        lines.append(
            f"| {row} | {one['kl']:.4f} | {one['kl error']:.4f} | {100 * one['same']:.1f} % "
            f"| {one['perplexity']:.2f} | {one['bits']:.2f} | {one['bits with the head']:.2f} "
            f"| {'' if greedy is None else f'{100 * greedy:.0f} %'} |"
        )
    lines += ["", f"Perplexity of float32: {one['perplexity of float32']:.2f}.", ""]
    return [*lines, f"![KL against decoding and reading]({name}-quality.svg)", ""]


def _growth(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for task, words in GROWN.items():
        runs = {
            name.split("/")[1]: figures["points"]
            for name, figures in found["done"].items()
            if name.startswith(f"{task}/")
        }
        if not runs:
            continue
        lines += [f"| {words} | engine | first token s | tokens/s |", "|---|---|---|---|"]
        for engine, points in runs.items():
            for at, one in points.items():
                first = _cell(one.get("first_s"), 1, 2)
                lines.append(f"| {at} | {engine} | {first} | {one['tokens_per_s']:.1f} |")
        lines.append("")
    return lines


def _lookup(found: dict[str, Any]) -> list[str]:
    looked = found["done"].get("lookup")
    if not looked:
        return []
    lines = [
        "Prompt lookup on given answers (benchmarks/lookup.py), lapilli int4:",
        "",
        "| answer | tokens | without, tokens/s | always on | while it pays (default) |",
        "|---|---|---|---|---|",
    ]
    for name, one in looked.items():
        rate = one["tokens_per_s"]["off"]
        lines.append(
            f"| {name} | {one['tokens']} | {rate:.1f} | {one['on over off']:.2f} x "
            f"| {one['auto over off']:.2f} x |"
        )
    return [*lines, ""]


def _start(found: dict[str, Any]) -> list[str]:
    lines = []
    if "start_up" in found:
        start = found["start_up"]
        lines += [
            f"Whole processes: import torch {start['import_torch_s']:.2f} s, `lapilli ask` on "
            f"pebble {start['ask_s']:.2f} s, `lapilli --help` {start['help_s']:.2f} s.",
            "",
        ]
    return lines
