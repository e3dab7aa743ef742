"""Features that a stranger computed, on every route that reads them: a 4xx with the cause."""

import base64
import json

import pytest
import torch
from safetensors.torch import save

from lapilli.prompt.message import MediaPart
from tests.serve.conftest import asked, data_uri, picture

WIDTH = 256
TEXT = {"type": "text", "text": "What color is the circle?"}
PREDICATE = {"type": "predicate", "instructions": "Is there a circle?"}
CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]}
LABELS = {"label_token_ids": [5, 17]}


def turns(*parts):
    return [{"role": "user", "content": list(parts)}]


ROUTES = {
    "chat": lambda part: ("/v1/chat/completions", {"messages": turns(part, TEXT)}),
    "responses": lambda part: (
        "/v1/responses",
        {"model": "pebble", "input": turns(part, {"type": "input_text", "text": "What?"})},
    ),
    "decisions, input": lambda part: (
        "/v1/decisions",
        {"input": turns(part), "questions": [PREDICATE, CHOICE]},
    ),
    "decisions, question": lambda part: (
        "/v1/decisions",
        {"input": "a", "questions": [PREDICATE | {"instructions": [part, TEXT]}]},
    ),
    "embeddings, parts": lambda part: ("/v1/embeddings", {"input": ["a", [part, TEXT]]}),
    "embeddings, alone": lambda part: ("/v1/embeddings", {"input": [[part]]}),
    "embeddings, messages": lambda part: ("/v1/embeddings", {"messages": turns(part, TEXT)}),
    "score, query": lambda part: ("/v1/score", {"query": [part, TEXT], "items": ["a"], **LABELS}),
    "score, item": lambda part: ("/v1/score", {"query": "a", "items": ["b", [part]], **LABELS}),
    "rerank, query": lambda part: ("/v1/rerank", {"query": [part, TEXT], "documents": ["a"]}),
    "rerank, document": lambda part: ("/rerank", {"query": "a", "documents": ["b", [part]]}),
    "rerank, content": lambda part: (
        "/v2/rerank",
        {"query": "a", "documents": [{"content": [part]}]},
    ),
}

ONE_NAN = torch.zeros(64, WIDTH)
ONE_NAN[63, 255] = float("nan")
HOSTILE = {
    "NaN": (ONE_NAN, "NaN or infinite"),
    "infinite": (torch.full((64, WIDTH), float("inf")), "NaN or infinite"),
    "minus infinite": (torch.full((64, WIDTH), float("-inf")).bfloat16(), "NaN or infinite"),
    "narrow": (torch.zeros(64, 7), "[n, 256]"),
    "wide": (torch.zeros(64, WIDTH + 1), "[n, 256]"),
    "integers": (torch.zeros(64, WIDTH, dtype=torch.int64), "dtype 'I64'"),
    "float64": (torch.zeros(64, WIDTH, dtype=torch.float64), "dtype 'F64'"),
    "truth values": (torch.zeros(64, WIDTH, dtype=torch.bool), "dtype 'BOOL'"),
    "a vector": (torch.zeros(WIDTH), "one matrix"),
    "three axes": (torch.zeros(1, 64, WIDTH), "one matrix"),
    "no row": (torch.zeros(0, WIDTH), "at least one row is needed"),
    "many rows": (torch.zeros(5000, WIDTH), "more than the context"),
    "large numbers": (torch.full((64, WIDTH), 3e38), "too large for the model to square"),
}


def part_of(features):
    data = base64.b64encode(save({"features": features.contiguous()})).decode()
    return {"type": "image_embeds", "image_embeds": data}


def good(client):
    body = asked("What color is the circle?", data_uri(picture("red")))
    found = client.post("/v1/chat/completions", json=body).json()
    assert found["choices"][0]["message"]["content"] == "red"


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("route", ROUTES)
def test_hostile_features_are_400_with_the_cause(client, route, hostile):
    features, cause = HOSTILE[hostile]
    path, body = ROUTES[route](part_of(features))
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert cause in response.json()["error"]["message"]
    good(client)


@pytest.mark.parametrize("given", [7, [1.0, 2.0], {"data": ""}, "no base64!", "AAAA"])
@pytest.mark.parametrize("route", ROUTES)
def test_what_is_no_file_of_features_is_400_too(client, route, given):
    path, body = ROUTES[route]({"type": "image_embeds", "image_embeds": given})
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert "image_embeds" in response.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_features_of_a_picture_are_taken(client, pebble, route):
    """What is refused above is not refused for its route."""
    prepared = pebble.prepare(MediaPart(picture("red")))
    [features] = pebble.model.modality("image").embed([prepared])
    path, body = ROUTES[route](part_of(features.detach()))
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text


def test_vectors_in_the_place_of_a_token_are_checked_too(client):
    body = {"query": [5, 9], "items": ["a"], **LABELS, "embed_override_token_id": 9}
    for number in ("NaN", "Infinity", "-Infinity", "1e39", "1e999"):
        text = json.dumps(body | {"query_embed_overrides": [["@", *[0.0] * (WIDTH - 1)]]})
        text = text.replace('"@"', number)
        response = client.post(
            "/v1/score", content=text, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert "NaN or infinite" in message or "finite number" in message
    body["query_embed_overrides"] = [[0.0] * 7]
    response = client.post("/v1/score", json=body)
    assert response.status_code == 400
    assert "expected a vector of 256 numbers" in response.json()["error"]["message"]
