"""Given answers: the engine says them word by word, guesses included."""

import json

import pytest
import torch
from torch import nn

import lapilli
from benchmarks.figures import Question
from benchmarks.lookup import Counted, GivenAnswer, given, texts
from lapilli.generate.engine import EngineOptions
from lapilli.pipeline import Chat

ANSWER = [20, 21, 22, 23, 24, 25] * 6


@pytest.fixture(scope="module")
def pebble() -> Chat:
    return lapilli.load("pebble", device="cpu", dtype="float32")


@pytest.mark.parametrize(("mode", "steps"), [("off", len(ANSWER)), ("on", 20)])
def test_an_answer_that_repeats_needs_fewer_passes_with_guesses(
    pebble: Chat, mode: str, steps: int
) -> None:
    engine = Counted(pebble, options=EngineOptions(speculate=mode))
    model = pebble.model.language_model
    assert isinstance(model, nn.Module)
    with given(model, ANSWER) as engine.forced:
        [times] = engine.answer([Question((), (5, 6, 7))], len(ANSWER))
    assert engine.forced.known == len(times) == len(ANSWER)
    assert len(set(times)) == steps if mode == "off" else len(set(times)) < steps
    assert "logits" not in vars(model)


def test_the_given_token_wins_in_every_row() -> None:
    forced = GivenAnswer(lambda hidden: hidden.clone(), [3, 1, 0, 2])
    forced.known = 1
    logits = forced(torch.randn(2, 5))
    assert logits.argmax(dim=-1).tolist() == [1, 0]
    forced.known = 3
    assert forced(torch.randn(3, 5))[:1].argmax(dim=-1).tolist() == [2]


def test_the_texts_are_the_same_receipt_and_prose() -> None:
    found = texts()
    records = json.loads(found["JSON"])
    lines = found["receipt"].splitlines()
    assert len(records) == len(lines) == 14
    assert all(record["name"] in line for record, line in zip(records, lines, strict=True))
    words = found["prose"].split()
    assert len({tuple(words[i : i + 3]) for i in range(len(words) - 2)}) == len(words) - 2
