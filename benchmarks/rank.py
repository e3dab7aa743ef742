"""What ranking costs: items a second of full texts, summaries and stored vectors after one prefix.

    python -m benchmarks.rank --out benchmarks/results/rank.json

The shape is that of SmolLM2-135M with gaussian weights in float32. A query of `--items` items is
a prefix of 60 positions, or one of 3,000; after every item come 5 positions that
open the answer. Full texts have 450 positions, summaries 60, stored vectors one.

    alone     every prompt whole: prefix, item and end
    shared    the prefix once, items packed behind it (lapilli.rank.SuffixScorer)

Of the slow ways some items are measured: seconds of a query are those of the prefix and `--items`
times those of an item. The ways take turns, and the fastest round of each counts. Random tokens,
no tokenizer. Read the ratios.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from lapilli.config.model import DecoderConfig
from lapilli.lm import build_language_model
from lapilli.model import VisionLanguageModel
from lapilli.pipeline import ProcessedPrompt
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.quant.autotune import Choices, cache_file, take_faster_products
from lapilli.rank import SuffixScorer

SHAPES = {
    "smollm2-135m": DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        norm_eps=1e-5,
        rope_theta=100000.0,
        max_positions=8192,
        tie_embeddings=True,
    ),
    "tiny": DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=100000.0,
        max_positions=8192,
    ),
}
FULL, SUMMARY, END = 450, 60, 5
LABELS = (11, 12)
WAYS = ("full text alone", "full text", "summaries alone", "summaries", "vectors")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.rank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    found.add_argument("--items", type=int, default=250, help="of a query")
    found.add_argument("--prefixes", default="60,3000", help="positions of prefixes")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--out", type=Path, help="JSON")
    return found


def make_model(shape: str) -> VisionLanguageModel:
    """A model with gaussian weights, whose products are those that loading chooses."""
    torch.manual_seed(0)
    model = VisionLanguageModel(build_language_model(SHAPES[shape])).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    take_faster_products(model, Choices(cache_file()))
    return model


def text(length: int, seed: int) -> ProcessedPrompt:
    """A piece of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 500, (length,), generator=generator).tolist()
    return ProcessedPrompt(EncodedPrompt(ids, [False] * length), ())


def vector(width: int, seed: int) -> ProcessedPrompt:
    """One stored vector and the end of the prompt."""
    stored = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
    ids = [0, *text(END, seed).encoded.input_ids]
    return ProcessedPrompt(EncodedPrompt(ids, [False] * len(ids), (Span(0, 0, 1),)), (stored,))


def pieces(way: str, count: int, width: int) -> list[ProcessedPrompt]:
    """Items of a way, each with the end of the prompt behind it."""
    if way == "vectors":
        return [vector(width, seed) for seed in range(count)]
    length = (FULL if way.startswith("full") else SUMMARY) + END
    return [text(length, seed) for seed in range(count)]


class Alone(SuffixScorer):
    """Every prompt whole, one after the other: what `_pass` is compared with."""

    _pass = SuffixScorer._alone


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measured(way: str, items: int, prefix: int) -> int:
    """How many items of a way are measured: a few where each of them takes long."""
    positions = (prefix if way.endswith("alone") else 0) + (
        1 if way == "vectors" else FULL if way.startswith("full") else SUMMARY
    )
    return max(1, min(items, 1500 // (positions + END)))


def measure(model: VisionLanguageModel, prefix: int, items: int, rounds: int) -> dict[str, Any]:
    """Seconds of a prefix and of an item of every way, and items a second of a query."""
    width = model.language_model.config.hidden_size
    query = text(prefix, -1)
    counts = {way: measured(way, items, prefix) for way in WAYS}
    given = {way: pieces(way, count, width) for way, count in counts.items()}
    shared, alone = SuffixScorer(model), Alone(model)

    def score(scorer: SuffixScorer, some: Sequence[ProcessedPrompt]) -> None:
        list(scorer.logits(query, some, LABELS))

    best: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        best[name] = min(value, best.get(name, value))

    one = [text(1, 0)]
    for _ in range(rounds):
        note("prefix", seconds(lambda: score(SuffixScorer(model), one)))
        score(shared, one)
        for way in WAYS:
            scorer = alone if way.endswith("alone") else shared
            taken = seconds(lambda scorer=scorer, way=way: score(scorer, given[way]))
            note(way, taken / counts[way])
    found: dict[str, Any] = {"prefix s": best["prefix"], "ways": {}}
    for way in WAYS:
        whole = items * best[way] + (0 if way.endswith("alone") else best["prefix"])
        found["ways"][way] = {
            "measured items": counts[way],
            "s of an item": best[way],
            "items/s": items / whole,
        }
    rates = {way: found["ways"][way]["items/s"] for way in WAYS}
    found["ratios"] = {
        "vectors to full text alone": rates["vectors"] / rates["full text alone"],
        "vectors to full text": rates["vectors"] / rates["full text"],
        "vectors to summaries": rates["vectors"] / rates["summaries"],
        "sharing, full text": rates["full text"] / rates["full text alone"],
        "sharing, summaries": rates["summaries"] / rates["summaries alone"],
    }
    return found


def describe(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = []
    for prefix, one in found["prefixes"].items():
        lines.append(f"prefix of {prefix} positions, {found['items']} items")
        lines += [f"  {way:16} {row['items/s']:10.2f} items/s" for way, row in one["ways"].items()]
        lines += [f"  {name:28} {ratio:6.1f} x" for name, ratio in one["ratios"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; write JSON where `--out` says."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = make_model(options.shape)
    found: dict[str, Any] = {
        "machine": machine(),
        "shape": options.shape,
        "threads": options.threads,
        "rounds": options.rounds,
        "items": options.items,
        "positions": {"full text": FULL, "summary": SUMMARY, "vector": 1, "end": END},
        "prefixes": {},
    }
    for prefix in map(int, options.prefixes.split(",")):
        one = measure(model, prefix, options.items, options.rounds)
        found["prefixes"][str(prefix)] = one
        if options.out is not None:  # whatever ends the program, what was measured is there
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(describe(found))


if __name__ == "__main__":
    main()
