"""Texts without a bound: every route that tokenizes refuses them before it does."""

import json
import socket
import threading

import pytest

from lapilli.serve.options import Limits
from lapilli.serve.service import LONGEST_TOKEN
from tests.serve.conftest import asked
from tests.serve.test_auth import routes_of
from tests.serve.test_stream import until

QUESTION = {"type": "predicate", "instructions": "Is it red?"}
CHOICE = {"type": "choice", "instructions": "Which?", "spelled": True}


def bodies(text: str) -> list[tuple[str, dict[str, object]]]:
    """Return bodies with a text in every place that is tokenized, by their routes."""
    turns = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    score = {"query": "a", "items": ["b"], "label_token_ids": [5]}
    parts = [{"type": "text", "text": text}]
    return [
        ("/v1/chat/completions", turns),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": ["a", text]}),
        ("/v1/responses", {"input": text}),
        ("/v1/responses", {"input": "a", "instructions": text}),
        ("/v1/messages", turns),
        ("/v1/messages", {**turns, "messages": [{"role": "user", "content": "a"}], "system": text}),
        ("/v1/messages/count_tokens", turns),
        ("/api/chat", turns),
        ("/api/generate", {"prompt": text}),
        ("/v1/decisions", {"input": text, "questions": [QUESTION]}),
        ("/v1/decisions", {"input": "a", "questions": [QUESTION | {"instructions": text}]}),
        ("/v1/decisions", {"input": "a", "questions": [QUESTION | {"instructions": parts}]}),
        (
            "/v1/decisions",
            {"input": "a", "questions": [CHOICE | {"choices": [{"value": text}, {"value": "b"}]}]},
        ),
        ("/v1/embeddings", {"input": text}),
        ("/v1/embeddings", {"input": ["a", text]}),
        ("/v1/embeddings", {"input": [parts]}),
        ("/v1/score", score | {"items": ["b", text]}),
        ("/v1/score", score | {"query": text}),
        ("/v1/score", score | {"items": [parts]}),
        *[
            (path, body)
            for path in ("/rerank", "/v1/rerank", "/v2/rerank")
            for body in (
                {"query": text, "documents": ["b"]},
                {"query": "a", "documents": ["b", text]},
                {"query": "a", "documents": [{"content": parts}]},
                {"query": "a", "documents": ["b"], "instruct": text},
            )
        ],
        ("/tokenize", {"prompt": text}),
        ("/worker_generate_stream", {"prompt": text}),
    ]


WITHOUT_TEXT = {"/v1/files", "/worker_get_status", "/api/show", "/detokenize"}
"""Routes that are sent something and tokenize nothing."""


def test_every_route_is_looked_at(client):
    posts = {path for method, path in routes_of(client.app) if method == "POST"}
    assert posts - WITHOUT_TEXT == {path for path, _ in bodies("a")}


@pytest.fixture
def cut(client, monkeypatch):
    """Lengths of the texts that the tokenizer cuts."""
    found: list[int] = []
    kind = type(client.app.state.service.chat.tokenizer)
    inner = kind._tokens_of

    def cutting(self, text, literal):
        found.append(len(text))
        return inner(self, text, literal)

    monkeypatch.setattr(kind, "_tokens_of", cutting)
    return found


@pytest.mark.parametrize("at", range(len(bodies(""))))
def test_a_text_that_cannot_fit_is_refused_before_it_is_cut(client, cut, at):
    most = LONGEST_TOKEN * client.app.state.service.chat.context_length
    path, body = bodies("ab " * (most // 3 + 9))[at]
    response = client.post(path, json={"model": "pebble", **body})
    assert response.status_code == 400, response.text[:300]
    assert f"letters of text, more than the {most}" in response.text
    assert max(cut, default=0) < most // 2


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/detokenize", {}, "tokens"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/score", {"items": ["b"], "label_token_ids": [5]}, "query"),
    ],
)
def test_more_tokens_than_the_model_reads_are_refused(client, path, body, name):
    most = client.app.state.service.chat.context_length
    response = client.post(path, json={**body, name: [5] * (most + 1)})
    assert response.status_code == 400
    assert f"has {most + 1} tokens, more than the {most}" in response.json()["error"]["message"]


def test_many_texts_have_a_bound_together(serve, cut):
    client = serve(limits=Limits(letters=1000))
    body = {"input": ["a word or two "] * 100}
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 413
    assert "more than 1000 letters in all its texts together" in response.text
    assert sum(cut) <= 1100
    assert client.post("/v1/embeddings", json={"input": ["a word or two "] * 9}).status_code == 200


def test_what_waits_is_dropped_when_its_client_leaves(serve, monkeypatch):
    client = serve(limits=Limits(workers=1))
    service = client.app.state.service
    kind = type(service.chat.tokenizer)
    inner, go, begun = kind._tokens_of, threading.Event(), []

    def slow(self, text, literal):
        if "slow" in text:
            begun.append(text)
            go.wait(30)
        return inner(self, text, literal)

    monkeypatch.setattr(kind, "_tokens_of", slow)
    body = json.dumps(asked("a slow text"))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = client.base_url.host, client.base_url.port
    opened = [socket.create_connection(address) for _ in range(4)]
    for one in opened:
        one.sendall(f"{head}{body}".encode())
    until(lambda: service.num_waiting == 3)
    text = client.get("/metrics").text
    assert 'lapilli:num_requests_waiting{model_name="pebble"} 3.0' in text
    for one in opened:
        one.close()
    until(lambda: service.num_waiting == 0)
    go.set()
    assert client.post("/v1/chat/completions", json=asked("Hi")).status_code == 200
    assert len(begun) == 1
    assert not service.chat.engine.has_work


def test_metrics_see_scores_that_are_computed(client, monkeypatch):
    service = client.app.state.service
    kind = type(service.chat.tokenizer)
    inner, go = kind._tokens_of, threading.Event()

    def slow(self, text, literal):
        if "slow" in text:
            go.wait(30)
        return inner(self, text, literal)

    monkeypatch.setattr(kind, "_tokens_of", slow)
    body = {"query": "a slow one", "documents": ["b"]}
    codes: list[int] = []
    asking = threading.Thread(
        target=lambda: codes.append(client.post("/rerank", json=body).status_code)
    )
    asking.start()
    try:
        running = 'lapilli:num_requests_running{model_name="pebble"} 1.0'
        until(lambda: running in client.get("/metrics").text)
    finally:
        go.set()
        asking.join()
    assert codes == [200]
