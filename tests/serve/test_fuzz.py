"""Requests that nobody would send: every answer is a 4xx with a cause, and the server goes on."""

import json
import os
import random

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.serve.anthropic import CountBody, MessagesBody
from lapilli.serve.chat import ChatBody
from lapilli.serve.ollama import ChatBody as OllamaChat
from lapilli.serve.ollama import GenerateBody
from lapilli.serve.responses import ResponsesBody
from tests.serve.conftest import asked, data_uri, picture, serving

PATH = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
CASES = int(os.environ.get("LAPILLI_FUZZ_CASES", "300"))

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["user", "text", "image_url", "data:image/png;base64,aaaa", "\ud800", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "image_url", "url", "uuid", "file_id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
NAMES = tuple(ChatBody.model_fields)


def fails_well(response: httpx.Response) -> None:
    """Check that a refusal is a 4xx in OpenAI's form, with words in it."""
    assert response.status_code < 500, (response.status_code, response.text)
    if response.status_code >= 400:
        error = response.json()["error"]
        assert len(error["message"]) > 5, error
        assert set(error) == {"message", "type", "param", "code"}


@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(NAMES), anything, max_size=5),
    st.booleans(),
)
def test_wrong_values_of_every_field(client, given, with_messages):
    body = {"max_tokens": 2, **given}
    if with_messages:
        body["messages"] = asked("Hi", data_uri(picture()))["messages"]
    text = json.dumps(body)
    fails_well(client.post(PATH, content=text.encode("utf-8", "surrogatepass"), headers=JSON))


OTHERS = {
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
    "/api/chat": OllamaChat,
    "/api/generate": GenerateBody,
}


@pytest.mark.parametrize("path", OTHERS)
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_wrong_values_in_other_protocols(client, path, data):
    names = tuple(OTHERS[path].model_fields)
    given = data.draw(st.dictionaries(st.sampled_from(names), anything, max_size=4))
    short = {"max_tokens": 2, "max_output_tokens": 2, "options": {"num_predict": 2}}
    whole = {"model": "pebble", "input": "Hi", "prompt": "Hi", **short}
    whole["messages"] = [{"role": "user", "content": "Hi"}]
    text = json.dumps({**whole, **given}).encode("utf-8", "surrogatepass")
    response = client.post(path, content=text, headers=JSON)
    assert response.status_code < 500, (response.status_code, response.text)
    if response.status_code >= 400:
        assert len(response.json()["error"]) > 1


def test_bodies_that_are_no_json(client):
    rng = random.Random(0)
    good = json.dumps(asked("Hi", data_uri(picture()), max_tokens=2)).encode()
    for number in range(CASES):
        broken = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        if number % 3 == 0:
            broken = broken[: rng.randrange(len(broken))]
        fails_well(client.post(PATH, content=bytes(broken), headers=JSON))
    for bomb in (b"[" * 100_000, b'{"messages":' * 20_000, b'{"n":1' + b"0" * 10_000 + b"}"):
        response = client.post(PATH, content=bomb, headers=JSON)
        fails_well(response)
        assert response.status_code == 400
    response = client.post(PATH, json=asked("What color is the circle?", data_uri(picture())))
    assert response.json()["choices"][0]["message"]["content"] == "red"


def test_damaged_pictures(client):
    rng = random.Random(1)
    good = picture("blue")
    for _ in range(CASES // 3):
        broken = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        fails_well(client.post(PATH, json=asked("Hi", data_uri(bytes(broken)), max_tokens=2)))


@pytest.mark.slow
def test_the_schema_that_we_publish_is_what_we_do(pebble):
    """schemathesis makes requests of our OpenAPI description; none may end in a server error."""
    with serving(pebble) as client:
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        for operation in schema.get_all_operations():
            check = _checked(client, operation.ok())
            check()


def _checked(client, operation):
    @settings(
        max_examples=max(5, CASES // 30),
        suppress_health_check=list(HealthCheck),
        deadline=None,
        database=None,
    )
    @given(operation.as_strategy())
    def check(case):
        response = case.call(base_url=str(client.base_url))
        assert response.status_code < 500, (case.method, case.path, response.text)

    return check
