"""Structured output over HTTP: every name that a form has, and what is refused."""

import json
import re

import pytest

from tests.serve.conftest import asked, data_uri, picture

QUESTION = "What color is the circle?"
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": SCHEMA}}


def answer(client, **options):
    body = asked(QUESTION, data_uri(picture()), max_tokens=64, **options)
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": STRICT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
)
def test_a_schema_is_followed_with_a_picture(client, options):
    assert json.loads(answer(client, **options)) in ({"color": "red"}, {"color": "blue"})


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["green", "black"]}}, "green|black"),
        ({"guided_choice": ["green", "black"]}, "green|black"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "a|b"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "a|b"),
    ],
)
def test_other_forms(client, options, pattern):
    assert re.fullmatch(pattern, answer(client, **options))


def test_any_json_object(client):
    said = answer(client, response_format={"type": "json_object"})
    assert said.startswith("{")


def test_white_space_is_that_of_the_pattern(client):
    said = answer(client, structured_outputs={"json": SCHEMA, "whitespace_pattern": " "})
    assert re.fullmatch(r'\{ ?"color" ?: ?"(red|blue)" ?\}', said)


def test_completions_know_forms_too(client):
    body = {"prompt": "The circle is", "guided_choice": ["red", "blue"], "max_tokens": 8}
    response = client.post("/v1/completions", json=body)
    assert response.json()["choices"][0]["text"] in ("red", "blue")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"response_format": STRICT, "guided_regex": "a"}, "has one form, not response_format and"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "leave one out"),
        ({"response_format": {"type": "xml"}}, "expected text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "no schema"),
        ({"guided_regex": "(unclosed"}, "cannot be followed"),
        ({"guided_json": "{"}, "not JSON"),
        ({"guided_json": {"type": "nothing"}}, "cannot be followed"),
        ({"guided_choice": []}, "list of texts"),
        ({"structured_outputs": {"choice": 3}}, "list of texts"),
        ({"guided_grammar": "root ::= ("}, "GBNF"),
        ({"structured_outputs": {"regex": 3}}, "expected a text"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused_before_the_picture(client, options, match):
    body = asked(QUESTION, data_uri(b"no picture"), **options)
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert match in response.json()["error"]["message"]


COSTLY = {"type": "string", "pattern": "^(([a-z]{1,500}){1,500}){1,500}$"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_fails_while_the_answer_grows_is_the_client_s_fault(client, stream):
    body = asked(QUESTION, data_uri(picture()), guided_json=COSTLY, max_tokens=500, stream=stream)
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code == 200:  # it failed after the answer had begun
        assert stream
        [*_, last] = [one[6:] for one in response.text.splitlines() if one.startswith("data: ")]
        error = json.loads(last)["error"]
    else:
        assert response.status_code == 400, response.text
        error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "GrammarError")
    assert "the JSON schema" in error["message"]
    assert "takes too much time or memory" in error["message"]
