"""What is wrong with a body: no JSON, or not what a route takes, said in the client's own names."""

import json

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from lapilli.serve.decisions import DecisionBody
from lapilli.serve.embeddings import EmbeddingBody
from lapilli.serve.rerank import RerankBody
from lapilli.serve.responses import ResponsesBody
from lapilli.serve.validation import MOST_FIELDS, misfit

JSON = {"Content-Type": "application/json"}
DEEP = b'{"messages": ' + b"[" * 100_000
LONG = b'{"n": 1' + b"0" * 10_000 + b"}"
PATHS = {
    "/v1/chat/completions": lambda body: (body["error"]["message"], body["error"]["param"]),
    "/v1/responses": lambda body: (body["error"]["message"], body["error"]["param"]),
    "/v1/messages": lambda body: (body["error"]["message"], None),
    "/api/chat": lambda body: (body["error"], None),
    "/v1/decisions": lambda body: (body["error"]["message"], body["error"]["param"]),
}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            b'{"messages": [{"ro',
            "the body is no JSON: unterminated string starting at character 15",
        ),
        (b'{"model": "pebble"', "the body is no JSON: expecting ',' delimiter at character 18"),
        (b'{"a": "\n"}', "the body is no JSON: invalid control character at character 7"),
        (b'{"a": 1} x', "the body is no JSON: extra data at character 9"),
        (b'{"a": "\xff"}', "the body is no JSON: it is no UTF-8 at byte 7"),
        (DEEP, "it has lists or objects too deep"),
        (LONG, "a number has too many digits"),
        (b"", "the body is empty: send a JSON object"),
        (b"[1]", "the body must be an object, got a list"),
        (b"null", "the body"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("path", PATHS)
def test_each_cause_of_a_body_that_is_no_json_is_named(client, path, content, match):
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code == 400, response.text
    message, param = PATHS[path](response.json())
    assert match in message
    assert param is None


PARTS = "a text or a list of objects"
TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("path", "change", "param", "message"),
    [
        ("chat/completions", {"messages": [TURN, {"role": "user", "content": 5}]},
         "messages[1].content", f"messages[1].content must be {PARTS}, got 5"),
        ("chat/completions", {"guided_json": True},
         "guided_json", "guided_json must be a text or an object, got true"),
        ("chat/completions", {"stop": 5}, "stop", "stop must be a text or a list of texts, got 5"),
        ("chat/completions", {"stop": ["a", 5]}, "stop[1]", "stop[1] must be a text, got 5"),
        ("chat/completions", {"max_tokens": "many"},
         "max_tokens", "max_tokens must be a whole number, got 'many'"),
        ("chat/completions", {"max_tokens": 1.5},
         "max_tokens", "max_tokens must be a whole number, got 1.5"),
        ("chat/completions", {"messages": "Hi"}, "messages", "messages must be a list, got 'Hi'"),
        ("chat/completions", {"messages": [{"content": "a"}]},
         "messages[0].role", "messages[0].role is missing"),
        ("chat/completions", {"messages": ["Hi"]},
         "messages[0]", "messages[0] must be an object, got 'Hi'"),
        ("chat/completions", {"logit_bias": {"5": "a"}},
         "logit_bias.5", "logit_bias.5 must be a number, got 'a'"),
        ("chat/completions", {"n": {}, "seed": []},
         "n", "n must be a whole number, got an object; seed must be a whole number, got a list"),
        ("embeddings", {"input": ["a", 5]}, "input[1]",
         "input[1] must be a text, a list of whole numbers or a list of objects, got 5"),
        ("embeddings", {"input": [5, "a"]}, "input[1]",
         "input[1] must be a whole number, got 'a'"),
        ("embeddings", {"input": [[1, "a"]]}, "input[0][1]",
         "input[0][1] must be a whole number, got 'a'"),
        ("rerank", {"query": "a", "documents": ["b", 5]}, "documents[1]",
         "documents[1] must be a text, an object or a list of objects, got 5"),
        ("rerank", {"query": "a", "documents": ["b", {"text": 5}]}, "documents[1].text",
         "documents[1].text must be a text, got 5"),
        ("responses", {"input": [None]}, "input[0]", "input[0] must be an object, got null"),
        ("responses", {"input": None}, "input", f"input must be {PARTS}, got null"),
        ("decisions", {"input": "a", "questions": [{"type": "guess"}]}, "questions[0]",
         "questions[0]: type must be one of 'predicate', 'choice', 'score', got 'guess'"),
        ("decisions", {"input": "a", "questions": [{"type": "predicate"}]},
         "questions[0].instructions", "questions[0].instructions is missing"),
        ("decisions", {"input": "a", "questions": []}, "questions",
         "questions: list should have at least 1 item, not 0"),
        ("files", {}, None, ""),
    ],
)  # fmt: skip
def test_one_message_for_a_field_in_the_client_s_names(client, path, change, param, message):
    if path == "files":
        response = client.post("/v1/files", data={"file": "no file"}, files={"other": b"x"})
        param, message = "file", "file must be a file with a name"
    else:
        body = {"messages": [TURN], **change} if path == "chat/completions" else change
        response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(message), error
    assert error["param"] == param


def test_an_item_of_all_kinds_is_told_what_each_may_be(client):
    error = client.post("/v1/embeddings", json={"input": [None]}).json()["error"]
    assert error["param"] == "input[0]"
    for kind in ("a text", "a whole number", "a list of whole numbers", "a list of objects"):
        assert kind in error["message"]


def test_paths_are_written_as_each_protocol_does(client):
    body = {"model": "pebble", "max_tokens": 2, "messages": [{"role": "user", "content": 5}]}
    error = client.post("/v1/messages", json=body).json()["error"]
    assert error["message"] == f"messages.0.content must be {PARTS}, got 5"
    body = {"model": "pebble", "options": {"num_predict": "x"}}
    assert (
        client.post("/api/chat", json=body).json()["error"].startswith("options.num_predict must")
    )


def test_more_wrong_fields_than_fit_are_counted(client):
    wrong = ("n", "seed", "top_k", "top_p", "min_p", "temperature", "max_tokens")
    body = {"messages": [TURN], **dict.fromkeys(wrong, "x")}
    message = client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    assert message.count(" must be ") == MOST_FIELDS
    assert message.endswith(f"and {len(wrong) - MOST_FIELDS} more fields")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["str", "type", "text", "role", "content", "instructions", "int"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([DecisionBody, EmbeddingBody, RerankBody, ResponsesBody]),
    name=st.sampled_from(["input", "documents", "query", "questions", "messages", "stop"]),
    value=anything,
)
def test_a_message_names_a_place_that_the_client_wrote(kind, name, value):
    body = {name: value}
    try:
        TypeAdapter(kind).validate_python(body)
    except ValidationError as error:
        found = [one | {"loc": ("body", *one["loc"])} for one in error.errors()]
        told = misfit(RequestValidationError(found, body=body))
        assert told.status == 400
        assert told.param
        place: object = body
        for step in told.param.replace("[", ".").replace("]", "").split("."):
            if isinstance(place, list):
                place = place[int(step)]
            elif isinstance(place, dict) and step in place:
                place = place[step]
            else:  # the last one may be missing
                assert told.param.endswith(step)
                assert isinstance(place, dict)
                assert "is missing" in told.message
        json.dumps(told.body())
