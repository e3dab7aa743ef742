"""A checkpoint that knows pictures alone says so where a question comes without one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import lapilli
from lapilli.checkpoint.source import resolve
from lapilli.config.generation import SamplingParams
from lapilli.prompt.message import Message

NEEDS = "I need a picture to answer that"
PICTURE = np.full((100, 200, 3), 255, dtype=np.uint8)
FEW = SamplingParams(max_new_tokens=4)
QUESTIONS = ("What is the capital of France?", "capital of France", "How many objects are there?")


@pytest.fixture(scope="module")
def chat():
    return lapilli.load("pebble", device="cpu", dtype="float32")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_without_a_picture_is_answered_by_asking_for_one(chat, question):
    chat.reset()
    assert chat.ask(question) == NEEDS
    assert list(chat.stream(question)) == [NEEDS]
    assert chat.last.finish_reason == "stop"
    assert chat.last.text == NEEDS
    assert [message.text for message in chat.history] == [question, NEEDS] * 2


@pytest.mark.slow
def test_a_picture_that_comes_later_is_looked_at(chat):
    chat.reset()
    chat.ask("Hello")
    assert chat.ask("How many objects are there?", PICTURE, keep=True, max_new_tokens=4) != NEEDS
    assert len(chat.history) == 4
    assert chat.ask("What is this?", max_new_tokens=4) != NEEDS, "the picture is still there"
    chat.reset()
    assert chat.ask("What is this?") == NEEDS


@pytest.mark.slow
def test_every_way_of_asking_gives_the_same_answer(chat):
    blind, shown = [Message.user(QUESTIONS[0])], [Message.user("What is this?", PICTURE)]
    rows = [blind, shown, blind, shown, blind]
    assert chat.answer(blind).text == NEEDS
    answers = [answer.text for answer in chat.batch(rows, FEW)]
    assert [text == NEEDS for text in answers] == [True, False, True, False, True]
    assert answers[1] == answers[3] == chat.answer(shown, FEW).text
    found = dict(chat.as_completed(iter(rows), FEW))
    assert [found[number].text for number in range(5)] == answers
    assert chat.batch([blind, blind], FEW) == [chat.answer(blind)] * 2
    assert chat.ask_many([QUESTIONS[1]]) == [NEEDS]
    beams = SamplingParams(max_new_tokens=2, num_beams=2)
    assert [answer.text == NEEDS for answer in chat.batch(rows[:2], beams)] == [True, False]


def test_an_error_keeps_its_number_beside_told_answers(chat):
    rows = [[Message.user("Hi")], [Message.user("Hi", "nowhere.png")], [Message.user("Hi")]]
    found = dict(chat.as_completed(rows, FEW))
    assert found[0].text == found[2].text == NEEDS
    assert isinstance(found[1], lapilli.LapilliError)


def test_a_checkpoint_that_says_nothing_of_it_answers_itself(tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(resolve("pebble"), folder)
    world = json.loads((folder / "world.json").read_text())
    del world["without_picture"]
    (folder / "world.json").write_text(json.dumps(world))
    chat = lapilli.load(str(folder), device="cpu", dtype="float32", template="vicuna_v1")
    assert chat.ask(QUESTIONS[0], max_new_tokens=4) != NEEDS


@pytest.mark.parametrize("number", [None, 0, 2])
def test_who_asks_for_log_probabilities_gets_one_per_token(chat, number):
    blind = [Message.user(QUESTIONS[0])]
    params = SamplingParams(max_new_tokens=4, logprobs=number)
    found = [chat.answer(blind, params), dict(chat.as_completed([blind], params))[0]]
    chat.ask(QUESTIONS[0], logprobs=number)  # which keeps them in any case, for `doubt`
    assert chat.doubt() is None
    if number is None:
        assert [generation.logprobs for generation in found] == [None, None]
        return
    for generation in (*found, chat.last):
        reports = generation.logprobs
        assert [report.token_id for report in reports] == list(generation.token_ids)
        assert {report.logprob for report in reports} == {0.0}
        tops = [report.top for report in reports]
        assert tops == [((token, 0.0),) * min(number, 1) for token in generation.token_ids]
