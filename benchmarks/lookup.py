"""What prompt lookup gains on answers that repeat, and what it costs on those that do not.

Models with random weights repeat nothing that means something, so the answer is given: the model
reads and computes as always, and only then its logits are overwritten so that the next token is
that of a fixed text. Passes, guesses and checks are the engine's own. The texts are cut into the
pieces of pebble's tokenizer, which are shorter than those of a large vocabulary.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from benchmarks.engines import Options
from benchmarks.engines.lapilli import load_chat
from benchmarks.figures import Question, picture, rate
from benchmarks.timed import TimedChat
from lapilli.generate.engine import EngineOptions

TOKENS = 400
GOODS = "apples bread butter cheese coffee eggs flour honey milk oranges pears rice salt tea"


def texts() -> dict[str, str]:
    """A receipt as text, the same receipt as JSON, and prose that repeats nothing."""
    source = random.Random(5)
    rows = [(name, source.randint(1, 4), source.randint(80, 990)) for name in GOODS.split()]
    lines = [f"{count} x {name} {cents / 100:.2f} EUR" for name, count, cents in rows]
    records = [{"name": name, "count": count, "cents": cents} for name, count, cents in rows]
    prose = (
        "The boat lies on dry sand while two children pull at its rope. Behind them a dog barks "
        "toward grey waves, and far off some ship carries timber past our lighthouse. Nobody "
        "minds how cold this morning feels: they laugh, slip, then try again with more strength. "
        "An old man watches from his window, drinks hot soup, thinks about summers when he rowed "
        "there himself, before storms took half of that pier away."
    )
    return {"receipt": "\n".join(lines), "JSON": json.dumps(records), "prose": prose}


class GivenAnswer:
    """A language model's `logits` that end in given tokens.

    Args:
        logits: what it really computes.
        answer: the tokens.
    """

    def __init__(self, logits: Any, answer: list[int]) -> None:
        self._logits, self._answer = logits, answer
        self.known = 0
        self.passes = 0
        self.guesses = 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of one sequence: after its newest token, then after each guess."""
        found: torch.Tensor = self._logits(hidden)
        best = torch.tensor(self._answer[self.known : self.known + len(found)])
        rows = torch.arange(len(best))
        found[rows, best] = found.amax() + 1
        self.passes += 1
        self.guesses += len(found) - 1
        return found


@contextmanager
def given(model: nn.Module, answer: list[int]) -> Iterator[GivenAnswer]:
    """A model that says this."""
    forced = GivenAnswer(model.logits, answer)
    model.logits = forced
    try:
        yield forced
    finally:
        del model.logits


class Counted(TimedChat):
    """Tells the given answer how far it is."""

    forced: GivenAnswer

    def note(self, count: int) -> None:
        """So many tokens were chosen."""
        self.forced.known += count


def measure_lookup(options: Options, *, rounds: int = 3) -> dict[str, Any]:
    """Tokens a second with guesses off, on, and while they pay, in turns."""
    chat = load_chat(options)
    modes = {
        name: Counted(chat, options=EngineOptions(speculate=name)) for name in ("off", "on", "auto")
    }
    language_model = cast("nn.Module", chat.model.language_model)
    found: dict[str, Any] = {}
    for text_name, text in texts().items():
        ids = chat.tokenizer.encode(text, add_bos=False)[:TOKENS]
        rates: dict[str, list[float]] = {name: [] for name in modes}
        work: dict[str, dict[str, int]] = {}
        for _ in range(rounds):
            for name, engine in modes.items():
                seen = picture(0, engine.side)  # read once by each engine
                with given(language_model, ids) as forced:
                    engine.forced = forced
                    [times] = engine.answer([Question((seen,), (11, 12, 13))], len(ids))
                rates[name].append(rate(times))
                work[name] = {"passes": forced.passes, "guesses": forced.guesses}
        medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
        found[text_name] = {
            "tokens": len(ids),
            "characters": len(text),
            "tokens_per_s": medians,
            "on over off": medians["on"] / medians["off"],
            "auto over off": medians["auto"] / medians["off"],
            "last round": work,
        }
    return found
