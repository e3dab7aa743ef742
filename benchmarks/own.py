"""How fast a checkpoint of yours answers on this CPU, and how fast the machine would let it.

    python -m benchmarks.own                                                  pebble
    python -m benchmarks.own liuhaotian/llava-v1.5-7b --quantize int4

First token, decoding, memory, and the machine's limits. Pictures are noise, a new one for every
answer; nothing is guessed ahead.
"""

import argparse
import json
import time

import torch

import lapilli
from benchmarks.figures import Figures, Plan, measure
from benchmarks.limits import measure_limits
from benchmarks.timed import TimedChat


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.own",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("source", nargs="?", default="pebble", help="a directory or a hub id")
    found.add_argument("--base", help="the language model under a LoRA or a projector")
    found.add_argument("--adapter", help="a LoRA to lay over it")
    found.add_argument("--dtype", default="auto")
    found.add_argument("--quantize", help="int8 or int4")
    found.add_argument("--threads", type=int)
    found.add_argument("--new-tokens", type=int, default=64, help="of every answer, 2 or more")
    found.add_argument("--repeats", type=int, default=3, help="answers; the median counts")
    found.add_argument("--many", type=int, default=8, help="requests at the same time; 0: none")
    found.add_argument("--json", action="store_true", help="all figures, for programs")
    return found


def main(arguments: list[str] | None = None) -> None:
    wanted = parser().parse_args(arguments)
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    try:
        found = figures_of(wanted)
    except lapilli.LapilliError as error:
        parser().exit(2, f"error: {error}\n")
    threads = torch.get_num_threads()
    print(json.dumps(found | {"threads": threads}) if wanted.json else describe(found, wanted.many))


def figures_of(wanted: argparse.Namespace) -> Figures:
    """Load the checkpoint and measure it, then the machine."""
    started = time.perf_counter()
    chat = lapilli.load(
        wanted.source,
        base=wanted.base,
        adapter=wanted.adapter,
        device="cpu",
        dtype=wanted.dtype,
        quantize=wanted.quantize,
    )
    load_s = time.perf_counter() - started
    engine = TimedChat(chat)
    plan = Plan(
        new_tokens=wanted.new_tokens,
        repeats=wanted.repeats,
        many=wanted.many,
        vocabulary=min(Plan.vocabulary, chat.config.text.vocab_size),
    )
    found = {"load_s": load_s} | measure(engine, plan)
    # Last: its matrices would count as memory of the model.
    return found | measure_limits() | engine.work(plan.text)


def describe(found: Figures, many: int) -> str:
    """The figures for people.

    Args:
        found: as they were measured.
        many: requests at the same time.
    """
    read = found["weight_bytes"] * found["tokens_per_s"]
    seconds = found["first_s"] - found["tower_s"]
    prefill = found["prompt_operations"] / seconds
    tower = found["tower_operations"] / found["tower_s"]
    lines = [
        ("load", f"{found['load_s']:.2f} s"),
        ("look at a picture", f"{1e3 * found['tower_s']:.0f} ms, {tower / 1e9:.0f} GFLOP/s"),
        (
            f"first token, {found['positions']:.0f} positions",
            f"{found['first_s']:.2f} s, {prefill / 1e9:.0f} GFLOP/s beside the tower",
        ),
        (
            "second question, same picture",
            f"{found['second_s']:.3f} s, {100 * found['second_over_first']:.0f} % of the first",
        ),
        (
            "decoding",
            f"{found['tokens_per_s']:.1f} tokens/s, {read / 1e9:.1f} GB/s of weights, "
            f"{100 * read / found['bytes_per_s']:.0f} % of what the machine reads",
        ),
    ]
    if "many_tokens_per_s" in found:
        lines.append((f"{many} at once", f"{found['many_tokens_per_s']:.1f} tokens/s"))
    if "peak_bytes" in found:
        lines.append(("peak memory", f"{found['peak_bytes'] / 1e9:.2f} GB"))
    lines.append(
        (
            "this machine",
            f"{found['bytes_per_s'] / 1e9:.1f} GB/s; GFLOP/s: "
            f"{found['float32_per_s'] / 1e9:.0f} float32, "
            f"{found['bfloat16_per_s'] / 1e9:.0f} bfloat16, {found['int8_per_s'] / 1e9:.0f} int8",
        )
    )
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {words}" for name, words in lines)


if __name__ == "__main__":
    main()
