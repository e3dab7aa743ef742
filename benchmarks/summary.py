"""From what processes found to figures per engine, shares of the machine's limits, and ratios."""

import statistics
from typing import Any

from benchmarks.contest import ENGINES
from benchmarks.timed import prompt_operations
from lapilli.config.model import DecoderConfig, ProjectorConfig, VisionConfig
from lapilli.plan.flops import projector_operations, tower_operations

NUM_TEXT = 40
TARGETS = (
    # words, shapes, figure, least ratio, against which engines (beginning of their names)
    ("first token: times faster than llama.cpp Q4_0", "SL", "first_s", 1.6, "llama.cpp Q4_0"),
    ("first token: times faster than transformers float32", "S", "first_s", 2.0, "transformers f"),
    (
        "first token: times faster than transformers bfloat16",
        "S",
        "first_s",
        10.0,
        "transformers b",
    ),
    ("decode: times the rate of llama.cpp Q4_0", "SL", "tokens_per_s", 1.1, "llama.cpp Q4_0"),
    ("8 at once: times llama.cpp's slots", "S", "many_tokens_per_s", 2.0, "llama.cpp Q4_0"),
    (
        "8 at once, reading included: times llama.cpp's slots",
        "",
        "many_whole_tokens_per_s",
        2.0,
        "llama.cpp Q4_0",
    ),
)


def medians(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of every figure of every engine, over its processes."""
    rows: dict[str, list[dict[str, float]]] = {}
    for name, figures in found["done"].items():
        task, _, rest = name.partition("/")
        if task in ("figures", "loading"):
            rows.setdefault(rest.rpartition("/")[0], []).append(figures)
    return {engine: _medians(processes) for engine, processes in rows.items()}


def spreads(found: dict[str, Any], figure: str) -> dict[str, tuple[float, float]]:
    """Least and largest value of a figure over the processes of each engine."""
    values: dict[str, list[float]] = {}
    for name, figures in found["done"].items():
        if name.startswith("figures/") and figure in figures:
            values.setdefault(name.split("/")[1], []).append(figures[figure])
    return {engine: (min(seen), max(seen)) for engine, seen in values.items()}


def limits(found: dict[str, Any]) -> dict[str, float]:
    """The machine's: the best of all rounds, since nothing can be faster than what it can do."""
    seen = [figures for name, figures in found["done"].items() if name.startswith("limits/")]
    return {key: max(figures[key] for figures in seen) for key in seen[0]} if seen else {}


def _medians(processes: list[dict[str, Any]]) -> dict[str, float]:
    keys = dict.fromkeys(key for process in processes for key in process)
    return {
        key: statistics.median(
            process[key] for process in processes if process.get(key) is not None
        )
        for key in keys
        if any(process.get(key) is not None for process in processes)
    }


def work(found: dict[str, Any]) -> dict[str, float]:
    """Operations of the tower and of the language model for the prompt."""
    text, vision = found["config"]["text_config"], found["config"]["vision_config"]
    decoder = DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text["hidden_size"] // text["num_attention_heads"],
        norm_eps=text["rms_norm_eps"],
        rope_theta=1e4,
        max_positions=text["max_position_embeddings"],
    )
    tower = VisionConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        feature_layer=found["config"]["vision_feature_layer"],
    )
    projector = ProjectorConfig(
        kind="mlp", depth=2, vision_size=tower.hidden_size, hidden_size=decoder.hidden_size
    )
    positions = tower.num_patches + NUM_TEXT
    return {
        "positions": float(positions),
        "tower_operations": tower_operations(tower) + projector_operations(tower, projector),
        "prompt_operations": prompt_operations(decoder, positions),
    }


def shares(found: dict[str, Any], rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Per engine, how much of the machine's limit is reached; the limit in the engine's arithmetic.

    decode: weight bytes x tokens a second over bytes a second that can be read. prefill: operations
    of the prompt over the time beside the tower. tower: over the best float rate.
    """
    most, tasks = limits(found), work(found)
    if not most:
        return {}
    floats = max(most["float32_per_s"], most["bfloat16_per_s"])
    shared = {}
    for engine in ENGINES:
        row = rows.get(engine.name)
        if row is None or "first_s" not in row:
            continue
        one = {"decode": row["weight_bytes"] * row["tokens_per_s"] / most["bytes_per_s"]}
        reading = row["first_s"] - row.get("tower_s", 0.0)
        peak = most[f"{engine.arithmetic}_per_s"]
        one["prefill"] = tasks["prompt_operations"] / reading / peak
        if "tower_s" in row:
            one["tower"] = tasks["tower_operations"] / row["tower_s"] / floats
        shared[engine.name] = one
    return shared


def ratios(found: dict[str, Any], rows: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The targets: what is wanted and what was reached."""
    ours = rows.get("lapilli int4")
    if ours is None:
        return []
    shape = found["settings"]["shape"]
    reached = []
    for words, shapes, figure, wanted, against in TARGETS:
        others = [
            row[figure] for name, row in rows.items() if name.startswith(against) and figure in row
        ]
        if others and figure in ours:
            # The best of what a peer reaches with any of its settings.
            is_time = figure == "first_s"
            value = min(others) / ours[figure] if is_time else ours[figure] / max(others)
            reached.append(_target(words, value, wanted, applies=shape in shapes))
    many = ours.get("many_tokens_per_s", 0.0) / ours["tokens_per_s"]
    if many:
        words = "8 at once: times our own single request"
        reached.append(_target(words, many, 4.0, applies=shape == "S"))
    words = "second question: first token as part of the first question's"
    reached.append(_target(words, ours["second_over_first"], 0.1, applies=True, most=True))
    share = shares(found, rows).get("lapilli int4", {}).get("decode")
    if share is not None:
        words = "decode: part of the memory bandwidth, in weight bytes"
        reached.append(_target(words, share, 0.8, applies=shape == "L"))
    if "peak_bytes" in ours:
        words = "peak memory, GB"
        gigabytes = ours["peak_bytes"] / 1e9
        reached.append(_target(words, gigabytes, 5.2, applies=shape == "L", most=True))
    for name, one in found["done"].get("lookup", {}).items():
        words = f"prompt lookup, {name}: times the rate without"
        reached.append(
            _target(words, one["auto over off"], 1.5, applies=shape in "SL" and name != "prose")
        )
    return reached


def _target(
    words: str, value: float, wanted: float, *, applies: bool, most: bool = False
) -> dict[str, Any]:
    kept = value <= wanted if most else value >= wanted
    sign = "at most" if most else "at least"
    return {
        "figure": words,
        "value": value,
        "target": f"{sign} {wanted:g}" if applies else None,
        "met": kept if applies else None,
    }
