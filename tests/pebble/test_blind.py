import re

import numpy as np
import pytest

from pebble.blind import NEEDS_PICTURE, UNHEARD, blind_question, exam_questions
from pebble.conversation import draw_questions
from pebble.sample import sample_scene
from pebble.talk import begun_blind


@pytest.fixture(scope="module")
def asked():
    rng = np.random.default_rng(0)
    return [blind_question(sample_scene(seed), rng) for seed in range(400)]


@pytest.mark.slow
def test_every_question_without_a_picture_has_one_answer(asked):
    assert {question.answer for question in asked} == {NEEDS_PICTURE}
    assert all(question.text.strip() for question in asked)


@pytest.mark.slow
def test_they_are_questions_of_the_world_and_anything_else(asked):
    texts = {question.text for question in asked}
    assert len(texts) > 350
    named = re.compile("circle|square|star|cross|ring|triangle|object|shape|picture|image|colour")
    assert 0.25 < np.mean([bool(named.search(text)) for text in texts]) < 0.6
    assert sum(any(sign.isdigit() for sign in text) for text in texts) > 15, "sums and nonsense"
    assert any(text == text.lower() for text in texts)


@pytest.mark.slow
def test_the_exam_asks_what_training_never_says():
    rng = np.random.default_rng(1)
    trained = {blind_question(sample_scene(seed), rng).text for seed in range(500)}
    assert not trained & set(UNHEARD)
    texts = exam_questions(10**9, 60)
    assert texts[: len(UNHEARD)] == list(UNHEARD)
    assert len(texts) == 60
    assert exam_questions(10**9, 3) == list(UNHEARD[:3])


@pytest.mark.slow
def test_a_picture_may_come_after_the_first_turns():
    kinds = set()
    for seed in range(60):
        scene = sample_scene(seed)
        rng = np.random.default_rng(seed)
        turns = draw_questions(scene, rng)
        talk, sample = begun_blind(scene, turns, rng)
        humans = [turn["value"] for turn in sample["conversations"] if turn["from"] == "human"]
        shown = [i for i, text in enumerate(humans) if "<image>" in text]
        blind = sum(turn.answer == NEEDS_PICTURE for turn in talk)
        assert blind >= 1
        assert len(humans) == len(talk)
        if "image" in sample:
            assert shown == [blind]
            assert talk[blind:] == turns
        else:
            assert not shown
            assert blind == len(talk)
        kinds.add("image" in sample)
    assert kinds == {True, False}
