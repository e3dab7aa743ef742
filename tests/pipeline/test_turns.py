"""A further turn computes what is new in it, and answers as if everything were computed anew."""

import copy
from collections.abc import Callable

import pytest
import torch
from PIL import Image

import lapilli
from lapilli import Chat, Message, SamplingParams
from lapilli.generate.engine import EngineOptions

PICTURE = Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 30).convert("RGB")
# Far from greedy: hardly an answer is cut as the tokenizer would cut its text.
WILD = {"max_new_tokens": 9, "temperature": 4.0, "top_p": 1.0}
QUESTIONS = ["What is shown?", "Where?", "And beside it?", "Why?", "Sure?", "Is there a star?"]


@pytest.fixture
def chat() -> Chat:
    return lapilli.load("pebble", device="cpu", dtype="float32")


def ask_all(chat: Chat, ask: Callable[..., str] | None = None) -> list[tuple[int, int]]:
    """Positions that every turn computed, and those that are new in it."""
    found = []
    for seed, question in enumerate(QUESTIONS):
        stats = copy.copy(chat.engine.prefix_stats)
        before = chat.last
        (ask or chat.ask)(question, *([] if seed else [PICTURE]), seed=seed, **WILD)
        known = before.prompt_len + len(before.token_ids) - 1 if before else 0
        now = chat.engine.prefix_stats
        computed = now.tokens - stats.tokens - (now.cached_tokens - stats.cached_tokens)
        found.append((computed, chat.last.prompt_len - known))
    return found


@pytest.mark.parametrize("options", [{}, {"block_size": 8}, {"kv_dtype": "int8"}])
def test_a_turn_computes_only_what_is_new_in_it(options: dict[str, object]) -> None:
    engine = EngineOptions(speculate="off", **options)
    chat = lapilli.load("pebble", device="cpu", dtype="float32", engine=engine)
    for computed, new in ask_all(chat):
        assert computed == new
    cut = [chat.tokenizer.encode(m.text, add_bos=False) for m in chat.history[1::2]]
    said = [list(m.parts[0].said.ids) for m in chat.history[1::2]]
    assert cut != said, "these answers were to be cut in an unusual way"


@pytest.mark.slow
def test_answers_are_those_of_a_conversation_that_is_sent_anew(chat: Chat) -> None:
    kept = []
    ask_all(chat, lambda *asked, **how: kept.append(chat.ask(*asked, **how)))
    chat.reset()
    chat.engine.reset_cache()
    for seed, (question, answer) in enumerate(zip(QUESTIONS, kept, strict=True)):
        chat.engine.reset_cache()
        assert chat.ask(question, *([] if seed else [PICTURE]), seed=seed, **WILD) == answer
        whole = [Message(m.role, m.parts) for m in chat.history[:-1]]
        fresh = chat.answer(whole, SamplingParams(seed=seed, **WILD))
        assert fresh.token_ids == chat.last.token_ids


@pytest.mark.parametrize("positions", [1, 5, 64, 196, 577])
def test_a_turn_costs_the_same_whatever_a_picture_takes(chat: Chat, positions: int) -> None:
    width = chat.config.text.hidden_size
    features = torch.randn(positions, width, generator=torch.Generator().manual_seed(0))
    computed = []
    for question in QUESTIONS[:3]:
        stats = copy.copy(chat.engine.prefix_stats)
        chat.ask(question, *([features] if question == QUESTIONS[0] else []), max_new_tokens=1)
        now = chat.engine.prefix_stats
        computed.append(now.tokens - stats.tokens - now.cached_tokens + stats.cached_tokens)
    assert computed[0] > positions
    # The only token of an answer is computed by the turn after it, with the end of the answer.
    asked = [len(chat.tokenizer.encode(f"USER: {q} ASSISTANT:")) for q in QUESTIONS[1:3]]
    assert [count - length for count, length in zip(computed[1:], asked, strict=True)] == [1, 1]
