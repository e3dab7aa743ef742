"""What an answer that follows a schema costs: its masks, and what its forced tokens gain.

    python -m benchmarks.grammar [MODEL] [--rounds N]

The answer is the same in every run, token for token: first the model gives one that follows the
schema, then its logits are overwritten so that each run says it again, with the schema and without,
in turns. So all runs read and compute the same, and differ in masks and passes alone.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import lapilli
from lapilli.config.generation import EngineOptions, SamplingParams
from lapilli.generate.engine import Engine, Request
from lapilli.prompt.message import Message

SCHEMA = {
    "type": "object",
    "properties": {
        "objects": {
            "type": "array",
            "minItems": 6,
            "maxItems": 6,
            "items": {
                "type": "object",
                "properties": {
                    "shape": {"enum": ["circle", "square", "triangle", "star"]},
                    "description": {"type": "string", "minLength": 20, "maxLength": 40},
                    "count": {"type": "integer", "minimum": 0, "maximum": 99},
                },
                "required": ["shape", "description", "count"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["objects"],
    "additionalProperties": False,
}
MODES = {
    "without": (False, "off"),
    "without, prompt lookup": (False, "on"),
    "with": (True, "off"),
    "with, forced tokens drafted": (True, "on"),
    "with, drafted while it pays": (True, "auto"),
}


class Said:
    """The logits of a model that says given tokens, in the one sequence of an engine."""

    def __init__(self, logits: Callable[..., torch.Tensor], engine: Engine, ids: list[int]) -> None:
        self._logits, self._engine, self._ids = logits, engine, ids
        self.passes = 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits after the newest token and every draft token."""
        found = self._logits(hidden)
        known = self._engine.scheduler.running[0].answer.num_tokens
        for row, token in enumerate(self._ids[known : known + len(found)]):
            found[row, token] = found[row].amax() + 1
        self.passes += 1
        return found


def timed(
    chat: lapilli.Chat, engine: Engine, request: Request, ids: list[int]
) -> tuple[float, int]:
    """Return tokens per second from the first token to the last, and the passes of the model."""
    language_model: Any = chat.model.language_model
    language_model.logits = said = Said(language_model.logits, engine, ids)
    try:
        handle = engine.submit(request)
        engine.step()  # the prompt, and the first token
        started = time.perf_counter()
        while engine.step():
            pass
        seconds = time.perf_counter() - started
    finally:
        del language_model.logits
    if list(handle.generation.token_ids) != ids:
        raise RuntimeError("the answer is another one than was given")
    return (len(ids) - 1) / seconds, said.passes


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Return median rates of all modes, in turns, and their passes."""
    chat = lapilli.load(model)
    conversation = [Message.user("Describe the picture as JSON.")]
    params = SamplingParams.from_options(schema=SCHEMA, max_new_tokens=600)
    prompt = chat.encode(conversation)
    ids = list(chat.answer(conversation, params).token_ids)
    plain = SamplingParams(max_new_tokens=len(ids))
    engines = {
        name: Engine(
            chat.model,
            chat.tokenizer,
            eos_ids=chat.config.tokens.eos_ids,
            options=EngineOptions(speculate=speculate),
        )
        for name, (_, speculate) in MODES.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in MODES}
    passes: dict[str, int] = {}
    for at in range(rounds + 1):  # the first one warms up
        for name, (has_schema, _) in MODES.items():
            request = Request(prompt.encoded, prompt.media, params if has_schema else plain)
            tokens_per_s, passes[name] = timed(chat, engines[name], request, ids)
            if at:
                rates[name].append(tokens_per_s)
    medians = {name: round(median(values), 1) for name, values in rates.items()}
    over = {name: round(value / medians["without"], 3) for name, value in medians.items()}
    return {
        "model": model,
        "tokens": len(ids),
        "rounds": rounds,
        "tokens_per_s": medians,
        "over without": over,
        "passes": passes,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="pebble")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.rounds), indent=2))


if __name__ == "__main__":
    main()
