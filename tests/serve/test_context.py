"""`lapilli serve --context N`: what is longer is refused with the number, on every route."""

from collections.abc import Iterator

import httpx
import pytest

import lapilli
from lapilli.errors import GenerationError
from lapilli.generate.engine import EngineOptions
from tests.serve.conftest import asked, data_uri, picture, serving
from tests.serve.test_stream import program

MOST = 150
LONG = "a red square and " * MOST
QUESTION = {"type": "predicate", "instructions": "Is it red?"}
TURNS = [{"role": "user", "content": LONG}]


@pytest.fixture(scope="module")
def short() -> Iterator[httpx.Client]:
    """A server of a context that is shorter than pebble's."""
    chat = lapilli.load("pebble", engine=EngineOptions(context_length=MOST))
    with serving(chat) as client:
        yield client


def answers(client: httpx.Client) -> None:
    body = asked("What color is the circle?", data_uri(picture("red")))
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "red"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": TURNS}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/messages", {"messages": TURNS, "max_tokens": 9}),
        ("/api/chat", {"messages": TURNS}),
        ("/api/generate", {"prompt": LONG}),
        ("/v1/decisions", {"input": LONG, "questions": [QUESTION]}),
        ("/v1/decisions", {"input": "a", "questions": [QUESTION | {"instructions": LONG}]}),
        ("/v1/embeddings", {"input": LONG}),
        ("/v1/embeddings", {"input": [5] * (MOST + 1)}),
        ("/v1/score", {"query": "a", "items": [LONG], "label_token_ids": [5]}),
        ("/rerank", {"query": "a", "documents": ["b", LONG]}),
        ("/rerank", {"query": LONG, "documents": ["b"]}),
    ],
)
def test_what_is_longer_is_400_with_the_number(short, path, body):
    response = short.post(path, json={"model": "pebble", **body})
    assert response.status_code == 400, response.text
    assert str(MOST) in response.text
    answers(short)


def test_pictures_count_as_the_positions_that_they_take(short):
    url = data_uri(picture("red"))
    response = short.post("/v1/chat/completions", json=asked("What is it?", url, url, url))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert (
        f"192 of them visual tokens, but prompt and answer together may have {MOST}"
        in (error["message"])
    )


def test_an_answer_has_what_the_prompt_leaves(short):
    body = asked("What is it?", data_uri(picture("red")), logit_bias={"2": -100})
    found = short.post("/v1/chat/completions", json=body).json()
    assert found["usage"]["total_tokens"] == MOST
    assert found["choices"][0]["finish_reason"] == "length"
    response = short.post("/v1/chat/completions", json={**body, "max_tokens": MOST})
    assert response.status_code == 400
    assert f"the context holds {MOST}: ask for at most" in response.json()["error"]["message"]


def test_the_model_list_names_it(short):
    [model] = short.get("/v1/models").json()["data"]
    assert model["max_model_len"] == MOST


@pytest.mark.slow
def test_the_option_of_the_command_is_that_limit():
    with program("--context", str(MOST)) as (_, address):
        [model] = httpx.get(f"{address}/v1/models").json()["data"]
        assert model["max_model_len"] == MOST


def test_a_model_does_not_read_more_than_it_can():
    most = lapilli.load("pebble").context_length
    with pytest.raises(GenerationError, match=f"at most {most}, what the model reads, got 99999"):
        lapilli.load("pebble", engine=EngineOptions(context_length=99_999))
    with pytest.raises(GenerationError, match="context_length must be a whole number"):
        EngineOptions(context_length=0)
