"""One engine in one process: loads a model, is measured, prints its figures as one line of JSON.

    python -m benchmarks.child figures llamacpp FILES --kind Q4_0 --threads 2
    python -m benchmarks.child limits

Imports an engine when it is asked for: each runs in the environment that has it.
"""

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import Options
from benchmarks.figures import (
    Figures,
    MeasuresItself,
    Plan,
    Question,
    Timed,
    measure,
    peak_bytes,
    picture,
    rate,
    rate_of_many,
    words,
)

VOCABULARY = 900
"""Ids of texts lie below: words of every engine's vocabulary."""


def figures(engine: Timed | MeasuresItself, wanted: argparse.Namespace) -> Figures:
    """Everything of the table."""
    plan = Plan(
        new_tokens=wanted.new_tokens,
        repeats=wanted.repeats,
        many=wanted.many,
        vocabulary=VOCABULARY,
    )
    if isinstance(engine, MeasuresItself):
        return engine.measure(plan)
    found = measure(engine, plan)
    if not getattr(engine, "has_tower", True):
        del found["tower_s"]
    return found


def growth(engine: Timed, wanted: argparse.Namespace) -> dict[int, Figures]:
    """First token and decoding at so many positions, requests or pictures; nothing is shared."""
    engine.answer([Question((), words(0, 8, VOCABULARY))], 2)
    return {at: _grown(engine, wanted.task, at) for at in wanted.at}


def _grown(engine: Timed, task: str, at: int, tokens: int = 16) -> Figures:
    if task == "batch":
        texts = [words(1000 * at + i, 255, VOCABULARY) for i in range(at)]
        answers = engine.answer([Question((), text) for text in texts], 3 * tokens)
        return {"tokens_per_s": rate(answers[0]) if at == 1 else rate_of_many(answers)}
    if task == "pictures":
        seen = tuple(picture(1000 * at + i, engine.side) for i in range(at))
        question = Question(seen, words(at, 39, VOCABULARY))
    else:
        question = Question((), words(at, at - tokens - 1, VOCABULARY))
    [times] = engine.answer([question], tokens)
    return {"first_s": times[0], "tokens_per_s": rate(times)}


def limits(wanted: argparse.Namespace) -> Figures:
    """What the machine can do."""
    import torch

    from benchmarks.limits import measure_limits

    torch.set_num_threads(wanted.threads)
    if wanted.quick:
        return measure_limits(megabytes=64, side=256, seconds=0.05)
    return measure_limits()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tasks = ("figures", "positions", "batch", "pictures", "lookup", "limits")
    parser.add_argument("task", choices=tasks)
    parser.add_argument("engine", nargs="?")
    parser.add_argument("files", type=Path, nargs="?")
    parser.add_argument("--kind", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--many", type=int, default=8)
    parser.add_argument("--at", type=int, nargs="*", default=[1], help="points of growth")
    parser.add_argument("--ik", type=Path, help="folder of ik_llama.cpp's programs")
    parser.add_argument("--quick", action="store_true")
    wanted = parser.parse_args()
    if wanted.task == "limits":
        print(json.dumps(limits(wanted)))
        return
    if wanted.task == "lookup":
        from benchmarks.lookup import measure_lookup

        options = Options(wanted.files, wanted.kind, wanted.threads)
        print(json.dumps(measure_lookup(options)))
        return
    start_bytes = peak_bytes()
    started = time.perf_counter()
    module = importlib.import_module(f"benchmarks.engines.{wanted.engine}")
    import_s = time.perf_counter() - started
    most = max(wanted.at)
    positions = {"positions": most, "pictures": 576 * most + 64}.get(wanted.task, 1024)
    options = Options(wanted.files, wanted.kind, wanted.threads, positions, wanted.ik)
    started = time.perf_counter()
    engine = module.load(options)
    found: dict[str, Any] = {
        "import_s": import_s,
        "load_s": time.perf_counter() - started,
        "start_bytes": start_bytes,
        "load_peak_bytes": peak_bytes(),
    }
    if isinstance(engine, MeasuresItself):  # this process loaded nothing
        found = figures(engine, wanted)
    elif wanted.task == "figures":
        found |= figures(engine, wanted)
    else:
        found["points"] = growth(engine, wanted)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
