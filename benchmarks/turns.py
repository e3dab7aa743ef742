"""What a further turn of a conversation costs: seconds to its first token, and positions computed.

    python -m benchmarks.turns pebble
    python -m benchmarks.turns MODEL --quantize int4 --pictures 112,196,336,anyres --folder DIR

A conversation about one picture goes on for twenty turns; only what is new in a turn should be
computed, however many positions the picture takes. Then a question of 32 tokens follows a history
of 16 to 1,024 tokens, once with what was computed of it and once with the whole sent anew.

`--pictures` gives a model as `lapilli quantize` writes it pictures of other sizes, `anyres` tiles.
Greedy answers of fixed length, nothing guessed ahead. A file that is there keeps its other
conversations.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lapilli
from benchmarks.checkpoint import with_pictures
from benchmarks.figures import Question, words
from benchmarks.machine import RESULTS, machine
from benchmarks.timed import TimedChat
from lapilli.generate.engine import EngineOptions
from lapilli.pipeline import Chat

HISTORIES = (16, 32, 64, 128, 256, 512, 1024)
QUESTION = 32
ASKED = "What else can be seen in this part of the picture, and where is it?"
SIZE = (900, 700)  # of a picture, in which anyres takes four tiles and the whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.turns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("source", nargs="?", default="pebble", help="a directory or a hub id")
    found.add_argument("--quantize", help="int8 or int4")
    found.add_argument("--pictures", help="sides of pictures in pixels, and anyres")
    found.add_argument("--folder", type=Path, help="where models with other pictures are made")
    found.add_argument("--turns", type=int, default=20)
    found.add_argument("--new-tokens", type=int, default=16, help="of every answer")
    found.add_argument("--rounds", type=int, default=3, help="conversations; the median counts")
    found.add_argument("--longest", type=int, default=HISTORIES[-1], help="history in tokens")
    found.add_argument("--threads", type=int)
    found.add_argument("--out", type=Path, help=f"JSON, such as {RESULTS.name}/turns.json")
    return found


def load(source: str, quantize: str | None) -> Chat:
    """A chat that guesses nothing ahead."""
    options = EngineOptions(speculate="off")
    return lapilli.load(source, device="cpu", quantize=quantize, engine=options)


def ask(chat: Chat, question: str, images: Sequence[Image.Image], tokens: int) -> dict[str, float]:
    """One turn: seconds to the first piece of text, and positions."""
    stats, text_ids = chat.engine.prefix_stats, chat.last
    known = 0 if text_ids is None or images else text_ids.prompt_len + len(text_ids.token_ids) - 1
    before = stats.tokens, stats.cached_tokens
    # The end token of a model with random weights comes when it likes.
    ends = {"logit_bias": dict.fromkeys(chat.config.tokens.eos_ids or (), -100.0)}
    started = time.perf_counter()
    pieces = chat.stream(question, *images, max_new_tokens=tokens, **ends)
    next(pieces, None)
    first_s = time.perf_counter() - started
    for _ in pieces:
        pass
    prompt, cached = stats.tokens - before[0], stats.cached_tokens - before[1]
    return {
        "first_s": first_s,
        "prompt": prompt,
        "new": prompt - known,
        "computed": prompt - cached,
    }


def converse(chat: Chat, number: int, turns: int, tokens: int) -> list[dict[str, float]]:
    """A conversation about a new picture."""
    pixels = random.Random(number).randbytes(3 * SIZE[0] * SIZE[1])
    picture = Image.frombytes("RGB", SIZE, pixels)
    return [ask(chat, ASKED, [] if turn else [picture], tokens) for turn in range(turns)]


def conversations(chat: Chat, *, turns: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of several conversations, turn by turn."""
    found = [converse(chat, number, turns, tokens) for number in range(rounds)]
    rows = []
    for same in zip(*found, strict=True):
        seconds = statistics.median(one["first_s"] for one in same)
        more = max(one["computed"] - one["new"] for one in same)
        rows.append({**same[0], "first_s": seconds, "computed beyond what is new": more})
    spans = chat.encode([lapilli.Message.user("", Image.new("RGB", SIZE))]).encoded.spans
    return {
        "visual positions": sum(span.length for span in spans),
        "last over second": rows[-1]["first_s"] / rows[1]["first_s"],
        "last three over turns 2 to 4": growth([row["first_s"] for row in rows]),
        "turns": rows,
    }


def growth(seconds: list[float]) -> float:
    """The last three turns over turns 2 to 4: medians, as single ones vary."""
    early = min(3, len(seconds) - 1)
    return statistics.median(seconds[-early:]) / statistics.median(seconds[1 : 1 + early])


def histories(chat: Chat, *, longest: int, rounds: int) -> list[dict[str, float]]:
    """A question after a history that is kept, and after one that is sent anew."""
    engine = TimedChat(chat)
    limit = min(900, chat.config.text.vocab_size)
    numbers = iter(range(1, 1_000_000))
    engine.answer([Question((), words(0, 8, limit))], 2)
    found = []
    for length in (one for one in HISTORIES if one <= longest):
        seconds: dict[str, list[float]] = {"kept_s": [], "anew_s": []}
        computed = 0
        for _ in range(rounds):
            for way, times in seconds.items():
                history = words(next(numbers), length - 1, limit)  # after BOS
                if way == "kept_s":
                    engine.answer([Question((), history)], 1)
                question = words(next(numbers), QUESTION, limit)
                stats = engine.engine.prefix_stats
                before = stats.tokens - stats.cached_tokens
                [answer] = engine.answer([Question((), (*history, *question))], 1)
                times.append(answer[0])
                if way == "kept_s":
                    computed = max(computed, stats.tokens - stats.cached_tokens - before)
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        times = {"times as fast": medians["anew_s"] / medians["kept_s"]}
        found.append({"history": length, "computed": computed, **medians, **times})
    return found


def models(wanted: argparse.Namespace) -> Iterator[str]:
    """The model as it is, or with pictures of every size that was asked for."""
    if wanted.pictures is None:
        yield wanted.source
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted.pictures.split(","):
            side = 336 if name == "anyres" else int(name)
            out = (wanted.folder or Path(folder)) / name
            yield str(with_pictures(Path(wanted.source), out, side, anyres=name == "anyres"))


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads()}
    found["conversations"] = {}
    for source in models(wanted):
        chat = load(source, wanted.quantize)
        chat.ask("Is there anything?", max_new_tokens=2)  # pages of the weights are read
        chat.reset()
        about = conversations(
            chat, turns=wanted.turns, tokens=wanted.new_tokens, rounds=wanted.rounds
        )
        found["conversations"][str(about["visual positions"])] = about
        if "histories" not in found:
            found["histories"] = histories(chat, longest=wanted.longest, rounds=wanted.rounds)
    return found


def describe(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = []
    for about in found["conversations"].values():
        rows = about["turns"]
        more = max(row["computed beyond what is new"] for row in rows)
        lines.append(
            f"{about['visual positions']:.0f} visual positions: turn 1 {rows[0]['first_s']:.3f} s "
            f"({rows[0]['computed']:.0f} computed), turn 2 {1e3 * rows[1]['first_s']:.0f} ms "
            f"({rows[1]['computed']:.0f}), turn {len(rows)} {1e3 * rows[-1]['first_s']:.0f} ms "
            f"({rows[-1]['computed']:.0f}), {about['last over second']:.2f} of turn 2; the last "
            f"three {about['last three over turns 2 to 4']:.2f} of turns 2 to 4; computed beyond "
            f"what is new: {more:.0f}"
        )
    lines += [
        f"history of {row['history']:.0f}: {1e3 * row['kept_s']:.0f} ms ({row['computed']:.0f} "
        f"computed), sent anew {1e3 * row['anew_s']:.0f} ms, {row['times as fast']:.1f} times"
        for row in found["histories"]
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    wanted = parser().parse_args(arguments)
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    try:
        found = measure(wanted)
    except lapilli.LapilliError as error:
        parser().exit(2, f"error: {error}\n")
    if wanted.out is not None:
        if wanted.out.exists():
            before = json.loads(wanted.out.read_text())["conversations"]
            found["conversations"] = before | found["conversations"]
        wanted.out.write_text(json.dumps(found, indent=1) + "\n")
    print(describe(found))


if __name__ == "__main__":
    main()
