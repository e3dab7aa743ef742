"""`/v1/chat/completions` of a real server: answers, streams, counts."""

import json

import pytest

import lapilli
from lapilli.config.generation import SamplingParams
from lapilli.prompt.message import Message
from tests.serve.conftest import asked, data_uri, picture

QUESTION = "What color is the circle?"


def post(client, body):
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client, body):
    """Return the chunks of a stream, which must end with [DONE]."""
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("colour", ["red", "blue", "green"])
def test_the_answer_is_that_of_the_library(client, pebble, colour):
    image = picture(colour)
    found = post(client, asked(QUESTION, data_uri(image)))
    [choice] = found["choices"]
    assert choice["message"]["content"] == pebble.answer([Message.user(QUESTION, image)]).text
    assert choice["finish_reason"] == "stop"
    assert colour in choice["message"]["content"]


def test_counts_are_those_of_the_prompt(client, pebble):
    image = picture("red")
    usage = post(client, asked(QUESTION, data_uri(image)))["usage"]
    prompt = pebble.encode([Message.user(QUESTION, image)])
    assert usage["prompt_tokens"] == len(prompt.encoded.input_ids)
    visual = sum(span.length for span in prompt.encoded.spans)
    assert usage["prompt_tokens_details"]["image_tokens"] == visual > 0
    answer = pebble.answer([Message.user(QUESTION, image)])
    assert usage["completion_tokens"] == len(answer.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_says_the_same(client):
    body = asked("What is in this picture?", data_uri(picture("red")))
    whole = post(client, body)
    chunks = streamed(client, {**body, "stream_options": {"include_usage": True}})
    *pieces, last = chunks
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in pieces)
    assert text.strip() == whole["choices"][0]["message"]["content"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens"):
        assert last["usage"][name] == whole["usage"][name]


def test_a_prompt_that_comes_again_is_counted_as_cached(client):
    body = asked(QUESTION, data_uri(picture("purple", 97)))
    post(client, body)
    usage = post(client, body)["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_several_choices_are_those_of_their_seeds(client, pebble):
    image, most = picture("red"), 8
    body = asked(QUESTION, data_uri(image), n=3, seed=7, temperature=1.5, max_tokens=most)
    choices = post(client, body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for number, choice in enumerate(choices):
        params = SamplingParams(temperature=1.5, seed=7 + number, max_new_tokens=most)
        answer = pebble.answer([Message.user(QUESTION, image)], params)
        assert choice["message"]["content"] == answer.text.strip()
    pieces = {0: "", 1: "", 2: ""}
    for chunk in streamed(client, body):
        for choice in chunk["choices"]:
            pieces[choice["index"]] += choice["delta"].get("content", "")
    assert [text.strip() for text in pieces.values()] == [c["message"]["content"] for c in choices]


def test_logprobs_belong_to_the_tokens_of_the_text(client):
    body = asked(QUESTION, data_uri(picture("red")), logprobs=True, top_logprobs=2)
    [choice] = post(client, body)["choices"]
    reports = choice["logprobs"]["content"]
    said = b"".join(bytes(one["bytes"]) for one in reports).decode()
    assert said.strip() == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in reports)
    of_stream = [
        one
        for chunk in streamed(client, body)
        for c in chunk["choices"]
        for one in (c.get("logprobs") or {"content": []})["content"]
    ]
    assert [one["token"] for one in of_stream] == [one["token"] for one in reports]


def test_three_pictures_stay_in_order(client, pebble):
    images = [picture(colour) for colour in ("red", "blue", "green")]
    found = post(client, asked("What color is the circle?", *map(data_uri, images)))
    answer = pebble.answer([Message.user("What color is the circle?", *images)])
    assert found["choices"][0]["message"]["content"] == answer.text.strip()
    usage = found["usage"]["prompt_tokens_details"]
    assert usage["image_tokens"] == 3 * 64


def test_another_model_is_not_found(client):
    response = client.post("/v1/chat/completions", json=asked("Hi", model="gpt-9"))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "pebble" in response.json()["error"]["message"]


def test_models_say_what_they_read(client):
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "pebble"
    assert model["modalities"] == ["text", "image"]
    assert model["max_model_len"] == lapilli.load("pebble").context_length
