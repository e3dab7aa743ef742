"""What the shipped weights answer in the pictures and questions of a person's first minutes."""

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from lapilli.config.generation import SamplingParams
from lapilli.pipeline import load
from lapilli.prompt.message import Message
from pebble.blind import NEEDS_PICTURE, UNHEARD
from pebble.scene import WORDS

NUMBERS = (
    "0",
    "3",
    "7",
    "9",
    "12",
    "17",
    "24",
    "35",
    "38",
    "42",
    "56",
    "61",
    "68",
    "73",
    "86",
    "99",
)
SHORT = SamplingParams(max_new_tokens=20)


@pytest.fixture(scope="module")
def chat():
    return load("pebble", dtype="float32")


def typed(text, size, points, *, ink="black", paper="white"):
    """A picture as a person's program draws it: Pillow's default font, in the middle."""
    picture = Image.new("RGB", size, paper)
    font = ImageFont.load_default(points)
    left, top, right, bottom = font.getbbox(text)
    corner = ((size[0] - right - left) / 2, (size[1] - bottom - top) / 2)
    ImageDraw.Draw(picture).text(corner, text, fill=ink, font=font)
    return picture


def share_read(chat, question, texts, **look):
    with torch.inference_mode():
        rows = [[Message.user(question, typed(text, **look))] for text in texts]
        answers = [answer.text.strip().lower() for answer in chat.batch(rows, SHORT)]
    return sum(a == text for a, text in zip(answers, texts, strict=True)) / len(texts)


LOOKS = [
    {"size": (200, 100), "points": 24},
    {"size": (200, 100), "points": 40},
    {"size": (200, 100), "points": 60},
    {"size": (200, 100), "points": 80},
    {"size": (200, 100), "points": 48, "ink": "white", "paper": "black"},
    {"size": (200, 100), "points": 48, "ink": "red"},
    {"size": (300, 100), "points": 60},
    {"size": (100, 100), "points": 40},
    {"size": (320, 240), "points": 64},
    {"size": (640, 480), "points": 160},
]


@pytest.mark.slow
def test_words_and_most_numbers_in_the_default_font_are_read(chat):
    numbers = [share_read(chat, "Which number is this?", NUMBERS, **look) for look in LOOKS]
    words = [
        share_read(chat, "What does it say?", WORDS, **look)
        for look in LOOKS
        if look["points"] < 70
    ]
    assert sum(numbers) / len(numbers) >= 0.7  # small ones are wrong: docs/guide/pebble.md
    assert sum(words) / len(words) >= 0.9


@pytest.mark.parametrize("points", [60, 80])
def test_numbers_that_fill_half_of_the_picture_are_read(chat, points):
    look = {"size": (200, 100), "points": points}
    assert share_read(chat, "Which number is this?", NUMBERS, **look) >= 0.9


@pytest.mark.slow
def test_most_wrong_readings_are_doubted(chat):
    wrong = doubted = 0
    for text in NUMBERS:
        answer = chat.ask("Which number is this?", typed(text, (200, 100), 27))
        wrong += answer != text
        doubted += answer != text and chat.doubt() is not None
    assert wrong >= 4
    assert doubted >= 0.6 * wrong


@pytest.mark.slow
def test_type_that_is_too_small_is_not_guessed(chat):
    for question in ("Which number is this?", "What does it say?"):
        answers = {chat.ask(question, typed(text, (200, 100), 10)) for text in NUMBERS[::5]}
        assert answers == {"too small to read"}


def test_without_a_picture_every_question_is_answered_by_asking_for_one(chat):
    rows = [[Message.user(question)] for question in UNHEARD]
    assert {answer.text.strip() for answer in chat.batch(rows, SHORT)} == {NEEDS_PICTURE}
