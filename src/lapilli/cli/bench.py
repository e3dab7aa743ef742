"""`lapilli bench`: how fast a checkpoint answers on this machine, and how fast it could."""

import json
import time
from typing import Annotated

import typer

from lapilli.cli import options
from lapilli.cli.terminal import loading, plain_errors

Source = Annotated[str, typer.Argument(help="A directory, a hub id, or pebble.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of all computations.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Tokens of every answer.")]
Repeats = Annotated[int, typer.Option(min=1, help="Answers; the median counts.")]
Many = Annotated[int, typer.Option(min=0, help="Requests at the same time; 0 leaves that out.")]


def bench(
    source: Source = "pebble",
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    base: options.Base = None,
    adapter: options.Adapter = None,
    threads: Threads = None,
    new_tokens: NewTokens = 64,
    repeats: Repeats = 3,
    many: Many = 8,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a checkpoint on this CPU: first token, decoding, memory, and the machine's limits.

    Pictures are noise, a new one for every answer; nothing is guessed ahead.
    """
    with plain_errors():
        with loading(source, quiet=quiet) as progress:
            import torch

            import lapilli
            from lapilli.cli.figures import Plan, measure
            from lapilli.pipeline.limits import measure_limits
            from lapilli.pipeline.timed import TimedChat

            if threads is not None:
                torch.set_num_threads(threads)
            started = time.perf_counter()
            chat = lapilli.load(
                source,
                base=base,
                adapter=adapter,
                device="cpu",
                dtype=dtype,
                quantize=quantize,
                progress=progress,
            )
            load_s = time.perf_counter() - started
        engine = TimedChat(chat)
        words = min(Plan.vocabulary, chat.config.text.vocab_size)
        plan = Plan(new_tokens=new_tokens, repeats=repeats, many=many, vocabulary=words)
        found = {"load_s": load_s} | measure(engine, plan)
        # Last: its matrices would count as memory of the model.
        found |= measure_limits() | engine.work(plan.text)
        threads = torch.get_num_threads()
        typer.echo(json.dumps(found | {"threads": threads}) if as_json else describe(found, many))


def describe(found: dict[str, float], many: int) -> str:
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
