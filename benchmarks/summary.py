"""From what processes found to figures per engine, shares of the machine's limits, and ratios."""

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.contest import ENGINES
from benchmarks.timed import prompt_operations
from lapilli.config.model import DecoderConfig, ProjectorConfig, VisionConfig
from lapilli.plan.flops import projector_operations, tower_operations

NUM_TEXT = 40
AS_GOOD = 1.05
"""A KL is equal or better up to this factor: other text of the same kind would move it as much."""


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that is wanted.

    Attributes:
        words: what the report calls it.
        figure: of lapilli int4 and of the others.
        against: beginning of the others' names; the best of them counts.
        wanted: the least ratio, by shape; no target where a shape is not named.
    """

    words: str
    figure: str
    against: str
    wanted: dict[str, float]


TARGETS = (
    Target(
        "first token: times faster than llama.cpp Q4_0", "first_s", "llama.cpp Q4_0", {"S": 2.2}
    ),
    Target(
        "first token: times faster than llama.cpp Q4_K_M", "first_s", "llama.cpp Q4_K_M", {"S": 2.2}
    ),
    Target(
        "first token: times faster than transformers float32",
        "first_s",
        "transformers float32",
        {"S": 2.0},
    ),
    Target(
        "first token: times faster than transformers bfloat16",
        "first_s",
        "transformers bfloat16",
        {"S": 10.0},
    ),
    Target(
        "prefill: times the rate of ik_llama.cpp Q4_0",
        "prefill_tokens_per_s",
        "ik_llama.cpp Q4_0",
        {"L": 1.3},
    ),
    Target(
        "decode: times the rate of ik_llama.cpp Q4_0",
        "tokens_per_s",
        "ik_llama.cpp Q4_0",
        {"L": 1.1},
    ),
    Target(
        "decode: times the rate of llama.cpp Q4_0",
        "tokens_per_s",
        "llama.cpp Q4_0",
        {"S": 1.25, "L": 1.2},
    ),
    Target(
        "decode: times the rate of llama.cpp Q4_K_M",
        "tokens_per_s",
        "llama.cpp Q4_K_M",
        {"S": 1.25},
    ),
    Target(
        "8 at once: times llama.cpp Q4_0's slots",
        "many_tokens_per_s",
        "llama.cpp Q4_0",
        {"S": 2.2, "L": 2.0},
    ),
    Target(
        "8 at once: times llama.cpp Q4_K_M's slots",
        "many_tokens_per_s",
        "llama.cpp Q4_K_M",
        {"S": 2.2},
    ),
    Target(
        "8 at once, reading included: times llama.cpp Q4_0's slots",
        "many_whole_tokens_per_s",
        "llama.cpp Q4_0",
        {},
    ),
)
# Against the best of ik_llama.cpp's formats whose KL is equal or better: see `rivals`.
PREFILL_AT_EQUAL_KL = {"S": 1.5}
DECODE_AT_EQUAL_KL = {"S": 1.1}
MANY_OVER_ONE = {"S": 5.0, "L": 4.5}


def medians(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of every figure of every engine, over its processes.

    Prefill is the positions of the prompt over the time to the first token beside the tower, where
    an engine does not measure it itself.
    """
    positions = work(found)["positions"]
    rows: dict[str, list[dict[str, float]]] = {}
    for name, figures in found["done"].items():
        task, _, rest = name.partition("/")
        if task in ("figures", "loading"):
            figures = dict(figures)
            if "first_s" in figures:
                reading = figures["first_s"] - figures.get("tower_s", 0.0)
                figures["prefill_tokens_per_s"] = positions / reading
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
        if row is None or "prefill_tokens_per_s" not in row:
            continue
        one = {"decode": row["weight_bytes"] * row["tokens_per_s"] / most["bytes_per_s"]}
        per_position = tasks["prompt_operations"] / tasks["positions"]
        peak = most[f"{engine.arithmetic}_per_s"]
        one["prefill"] = per_position * row["prefill_tokens_per_s"] / peak
        if "tower_s" in row:
            one["tower"] = tasks["tower_operations"] / row["tower_s"] / floats
        shared[engine.name] = one
    return shared


def figures_of_format(formats: dict[str, dict[str, float]], name: str) -> dict[str, float] | None:
    """Figures of a format; of a kind of GGUF those of the quantizer with the lower KL.

    llama.cpp's and ik_llama.cpp's quantizers differ, and the files of either run in both.
    """
    kind = name.rpartition(" ")[2]
    makers = (f"llama.cpp {kind}", f"ik_llama.cpp {kind}")
    known = [formats[each] for each in (makers if name in makers else (name,)) if each in formats]
    return min(known, key=lambda one: one["kl"], default=None)


def rivals(found: dict[str, Any]) -> list[str]:
    """Names of ik_llama.cpp's rows at equal or better KL than lapilli int4; none: nobody measured.

    Where none of its formats is as good, the best of them is the rival.
    """
    formats = found.get("quality", {}).get("formats", {})
    if "lapilli int4" not in formats:
        return []
    kls = {}
    for engine in ENGINES:
        known = figures_of_format(formats, engine.format)
        if engine.module == "ik" and known is not None:
            kls[engine.name] = known["kl"]
    most = AS_GOOD * formats["lapilli int4"]["kl"]
    as_good = [name for name, kl in kls.items() if kl <= most]
    return as_good or sorted(kls, key=lambda name: kls[name])[:1]


def ratios(found: dict[str, Any], rows: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The targets: what is wanted and what was reached."""
    ours = rows.get("lapilli int4")
    reached = quality_ratios(found.get("quality", {}).get("formats", {}))
    if ours is None:
        return reached
    shape = found["settings"]["shape"]
    for target in TARGETS:
        others = [row for name, row in rows.items() if name.startswith(target.against)]
        value = _times(ours, others, target.figure)
        if value is not None:
            reached.append(_target(target.words, value, target.wanted.get(shape)))
    for figure, words, wanted in (
        ("prefill_tokens_per_s", "prefill", PREFILL_AT_EQUAL_KL),
        ("tokens_per_s", "decode", DECODE_AT_EQUAL_KL),
    ):
        known = [name for name in rivals(found) if figure in rows.get(name, {})]
        if known and figure in ours:
            best = max(known, key=lambda name: rows[name][figure])
            value = ours[figure] / rows[best][figure]
            against = f"times the best of ik_llama.cpp at equal or better KL, {best}"
            reached.append(_target(f"{words}: {against}", value, wanted.get(shape)))
        every = [engine.name for engine in ENGINES if engine.module == "ik"]
        every = [name for name in every if figure in rows.get(name, {})]
        if every and figure in ours:
            best = max(every, key=lambda name: rows[name][figure])
            value = ours[figure] / rows[best][figure]
            against = f"times the fastest of ik_llama.cpp at any KL, {best}"
            reached.append(_target(f"{words}: {against}", value, None))
    return reached + _own_ratios(found, rows, ours)


def _times(ours: dict[str, float], others: list[dict[str, float]], figure: str) -> float | None:
    """How many times better ours is than the best of the others; None: not measured."""
    theirs = [row[figure] for row in others if figure in row]
    if not theirs or figure not in ours:
        return None
    return min(theirs) / ours[figure] if figure == "first_s" else ours[figure] / max(theirs)


def _own_ratios(
    found: dict[str, Any], rows: dict[str, dict[str, float]], ours: dict[str, float]
) -> list[dict[str, Any]]:
    """Targets that compare lapilli int4 with itself and with the machine."""
    shape = found["settings"]["shape"]
    reached = []
    many = ours.get("many_tokens_per_s", 0.0) / ours["tokens_per_s"]
    if many:
        words = "8 at once: times our own single request"
        reached.append(_target(words, many, MANY_OVER_ONE.get(shape)))
    words = "second question: first token as part of the first question's"
    reached.append(_target(words, ours["second_over_first"], 0.1, most=True))
    is_real = shape in "SL"  # nothing is wanted of the tiny shape
    share = shares(found, rows).get("lapilli int4", {})
    for key, words, least in (
        ("decode", "decode: part of the memory bandwidth, in weight bytes", 0.85),
        ("tower", "tower: part of the fastest float format's peak", 0.75),
    ):
        if key in share:
            reached.append(_target(words, share[key], least if is_real else None))
    if "peak_bytes" in ours:
        gigabytes = ours["peak_bytes"] / 1e9
        wanted = 5.2 if shape == "L" else None
        reached.append(_target("peak memory, GB", gigabytes, wanted, most=True))
    for name, one in found["done"].get("lookup", {}).items():
        words = f"prompt lookup, {name}: times the rate without"
        wanted = 1.5 if is_real and name != "prose" else None
        reached.append(_target(words, one["auto over off"], wanted))
    return reached


def quality_ratios(formats: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Targets of the quality of lapilli's formats, of what was measured (quality.py)."""
    reached = []
    ours = formats.get("lapilli int4")
    for other, wanted in (("Q4_K_M", 1.0), ("Q4_0", 0.7)):
        theirs = figures_of_format(formats, f"llama.cpp {other}")
        if ours and theirs:
            words = f"KL of int4 over that of {other}"
            reached.append(_target(words, ours["kl"] / theirs["kl"], wanted, most=True))
    theirs = figures_of_format(formats, "llama.cpp Q4_K_M")
    if ours and theirs:
        words = "bits per weight of int4 over those of Q4_K_M, layers alone"
        reached.append(_target(words, ours["bits"] / theirs["bits"], 1.0, most=True))
    eight = formats.get("lapilli int8", {})
    if "greedy answers equal" in eight:
        words = "int8: greedy answers equal to float32's"
        reached.append(_target(words, eight["greedy answers equal"], 0.6))
    return reached


def _target(
    words: str, value: float, wanted: float | None, *, most: bool = False
) -> dict[str, Any]:
    if wanted is None:
        return {"figure": words, "value": value, "target": None, "met": None}
    sign = "at most" if most else "at least"
    kept = value <= wanted if most else value >= wanted
    return {"figure": words, "value": value, "target": f"{sign} {wanted:g}", "met": kept}
