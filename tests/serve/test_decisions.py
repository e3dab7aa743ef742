"""`/v1/decisions` of a real server: OpenAI's shapes, the library's numbers."""

import pytest

from lapilli.pipeline.questions import Choice, Level, Option, Predicate, Score
from lapilli.prompt.message import MediaPart, Message
from tests.serve.conftest import data_uri, picture

QUESTIONS = [
    {"type": "predicate", "instructions": "Is there a circle?", "name": "circle"},
    {"type": "predicate", "instructions": "Is there a square?"},
    {
        "type": "choice",
        "instructions": "What color is the circle?",
        "choices": [{"value": "red"}, {"value": "blue"}],
        "spelled": True,
    },
    {
        "type": "choice",
        "instructions": "Which?",
        "choices": [{"value": True}, {"value": "true", "description": "a word"}],
    },
    {"type": "score", "instructions": "How large?", "levels": [{"label": "a"}, {"label": "b"}]},
]
SAME = [
    Predicate("Is there a circle?", "circle"),
    Predicate("Is there a square?"),
    Choice("What color is the circle?", ["red", "blue"], spelled=True),
    Choice("Which?", [True, Option("true", "a word")]),
    Score("How large?", [Level("a"), Level("b")]),
]


def shown(*images: bytes, text: str = "") -> list[dict]:
    parts = [{"type": "input_image", "image_url": data_uri(image)} for image in images]
    said = [{"type": "input_text", "text": text}] if text else []
    return [{"role": "user", "content": [*parts, *said]}]


def post(client, questions=QUESTIONS, given=None, **rest):
    body = {"model": "pebble", "input": given or shown(picture("red")), "questions": questions}
    return client.post("/v1/decisions", json={**body, **rest})


def test_answers_are_those_of_the_library(client, pebble):
    image = picture("red")
    response = post(client)
    assert response.status_code == 200, response.text
    found = response.json()
    expected = pebble.decide(MediaPart(image), SAME)
    first, second, spelled, choice, score = found["answers"]
    assert first["type"] == "predicate"
    assert first["name"] == "circle"
    assert first["probability"] == pytest.approx(expected[0].probability, abs=1e-3)
    assert first["probability"] > 0.9 > 0.1 > second["probability"]
    assert second["name"] is None
    assert spelled["choice"] == "red"
    assert [one["value"] for one in spelled["probabilities"]] == ["red", "blue"]
    assert [one["value"] for one in choice["probabilities"]] == [True, "true"]
    assert choice["confidence"] == max(one["probability"] for one in choice["probabilities"])
    assert [(one["label"], one["value"]) for one in score["probabilities"]] == [("a", 0), ("b", 1)]
    assert score["score"] == pytest.approx(score["probabilities"][1]["probability"])
    usage = found["usage"]
    assert usage["input_tokens"] == usage["total_tokens"] == expected.prompt_tokens
    assert usage["output_tokens"] == usage["output_tokens_details"]["reasoning_tokens"] == 0


def test_a_second_request_finds_what_was_read(client):
    given = shown(picture("green", 80))
    first, second = (post(client, QUESTIONS[:n], given).json()["usage"] for n in (1, 3))
    assert first["input_tokens_details"]["cached_tokens"] == 0
    written = first["input_tokens_details"]["cache_write_tokens"]
    assert second["input_tokens_details"] == {"cached_tokens": written, "cache_write_tokens": 0}
    assert written > 64


def test_pictures_stand_in_questions_too(client, pebble):
    image, other = picture("red"), picture("blue")
    part = {"type": "input_image", "image_url": data_uri(other)}
    instructions = [part, {"type": "input_text", "text": "Is there a blue circle?"}]
    question = {"type": "predicate", "instructions": instructions}
    [answer] = post(client, [question], shown(image, text="Look.")).json()["answers"]
    message = Message("user", (*Message.user("Look.", image).parts,))
    expected = pebble.decide([message], [Predicate((MediaPart(other), "Is there a blue circle?"))])
    assert answer["probability"] == pytest.approx(expected[0].probability, abs=1e-3)


def test_without_a_picture_every_question_is_refused(client):
    found = post(client, QUESTIONS[:2], "a red circle").json()["answers"]
    assert found == [{"type": "refusal", "name": "circle"}, {"type": "refusal", "name": None}]


def test_tools_and_json_are_part_of_the_input(client):
    given = [
        {"role": "developer", "content": "Be strict."},
        *shown(picture("red")),
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_image", "image_url": data_uri(picture("blue"))}],
        },
        {"role": "user", "content": [{"type": "input_json", "data": {"size": [1, 2]}}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Two circles."}]},
    ]
    response = post(client, QUESTIONS[:1], given)
    assert response.status_code == 200, response.text
    assert response.json()["answers"][0]["type"] == "predicate"


DEEP: dict = {}
for _ in range(40):
    DEEP = {"in": DEEP}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "questions"),
        ({"questions": QUESTIONS[:1] * 401}, "at most 400"),
        ({"questions": [{**QUESTIONS[2], "choices": [{"value": "a"}]}]}, "at least 2"),
        ({"questions": [{**QUESTIONS[2], "choices": [{"value": "a"}] * 2}]}, "comes twice"),
        ({"questions": [{"type": "guess", "instructions": "?"}]}, "questions[0]"),
        ({"questions": [{"type": "predicate", "instructions": ""}]}, "with something in them"),
        ({"questions": [{"type": "predicate", "instructions": [{"type": "x"}]}]}, "questions"),
        ({"input": []}, "input is empty"),
        ({"input": [{"role": "user"}]}, "needs a role and content"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            "no call before it",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_json", "data": DEEP}]}]},
            "32 levels",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_json", "data": 3}]}]},
            "needs data",
        ),
        ({"input": "red " * 3000}, "the model reads"),
        ({"model": "other"}, "does not exist"),
    ],
)
def test_what_is_wrong_is_said(client, change, message):
    body = {"model": "pebble", "input": shown(picture("red")), "questions": QUESTIONS[:1], **change}
    response = client.post("/v1/decisions", json=body)
    assert response.status_code == (404 if "model" in change else 400), response.text
    assert message in response.json()["error"]["message"]
