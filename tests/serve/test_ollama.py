"""Ollama's routes: lines of JSON, options, forms, calls, what there is."""

import base64
import json

import pytest

from lapilli import __version__
from tests.serve.conftest import picture

DATA = base64.b64encode(picture()).decode()
QUESTION = "What color is the circle?"
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}


def asked(**options):
    message = {"role": "user", "content": QUESTION, "images": [DATA]}
    return {"model": "pebble", "messages": [message], **options}


def whole(client, path, body):
    response = client.post(path, json={**body, "stream": False})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_stream_is_what_comes_without_asking(client):
    response = client.post("/api/chat", json=asked())
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == "red"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    found = whole(client, "/api/chat", asked())
    assert found["message"] == {"role": "assistant", "content": "red"}
    assert lines[-1]["eval_count"] == found["eval_count"]
    assert lines[-1]["prompt_eval_count"] == found["prompt_eval_count"] > 64
    assert found["total_duration"] == found["prompt_eval_duration"] + found["eval_duration"] > 0


def test_generate_is_a_question_or_a_text_that_goes_on(client):
    body = {"model": "pebble:latest", "prompt": QUESTION, "images": [DATA]}
    assert whole(client, "/api/generate", body)["response"] == "red"
    chat = client.post("/v1/completions", json={"prompt": "A red", "max_tokens": 4}).json()
    raw = {"model": "pebble", "prompt": "A red", "raw": True, "options": {"num_predict": 4}}
    assert whole(client, "/api/generate", raw)["response"] == chat["choices"][0]["text"].strip()
    loaded = whole(client, "/api/generate", {"model": "pebble"})
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")


def test_options_are_those_of_the_engine(client):
    hot = {"temperature": 2.0, "seed": 3, "num_predict": 5, "top_k": 0, "num_ctx": 4096}
    first, again = (whole(client, "/api/chat", asked(options=hot)) for _ in range(2))
    assert first["message"] == again["message"]
    assert first["eval_count"] <= 5
    assert whole(client, "/api/chat", asked(options={"num_predict": 1}))["done_reason"] == "length"
    stopped = whole(client, "/api/chat", asked(options={"stop": ["ed"], "num_predict": -1}))
    assert stopped["message"]["content"] == "r"


def test_forms(client):
    found = whole(client, "/api/chat", asked(format=SCHEMA))
    assert json.loads(found["message"]["content"])["color"] in ("red", "blue")
    found = whole(client, "/api/chat", asked(format="json", options={"num_predict": 8}))
    assert found["message"]["content"].startswith("{")


def test_the_picture_of_a_tool_is_seen(client):
    body = asked()
    plain = whole(client, "/api/chat", body)["prompt_eval_count"]
    call = {"function": {"name": "paint", "arguments": {"color": "red"}}}
    body["messages"] += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "painted", "images": [DATA]},
    ]
    assert whole(client, "/api/chat", body)["prompt_eval_count"] > plain + 64


def test_calls_are_objects(client, monkeypatch):
    """The model says a call by itself: what it says is put in its place."""
    tool = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
    from lapilli.serve import ollama

    monkeypatch.setattr(ollama, "tool_use", lambda tools: forced(tools))
    found = whole(client, "/api/chat", asked(tools=[tool]))
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] == "paint"
    assert call["function"]["arguments"]["color"] in ("red", "blue")
    lines = client.post("/api/chat", json=asked(tools=[tool])).text.splitlines()
    calls = [c for line in lines for c in json.loads(line)["message"].get("tool_calls", ())]
    assert calls == [call]


def forced(tools):
    from lapilli.serve.tools import tool_use

    return tool_use(tools, "required", is_parallel=False)


def test_what_there_is(client):
    assert client.get("/api/version").json() == {"version": __version__}
    [model] = client.get("/api/tags").json()["models"]
    assert model["name"] == "pebble:latest"
    assert model["details"]["parameter_size"] == "8.9M"
    assert len(model["digest"]) == 64
    shown = client.post("/api/show", json={"model": model["name"]}).json()
    assert set(shown["capabilities"]) == {"completion", "tools", "vision"}
    assert shown["model_info"]["llama.context_length"] == 2048
    assert client.get("/api/ps").json()["models"][0]["name"] == "pebble:latest"
    assert client.head("/").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "match"),
    [
        ("/api/chat", asked(model="llama9"), 404, "'llama9' does not exist"),
        ("/api/chat", asked(format="xml"), 400, "expected json or a JSON schema"),
        ("/api/chat", asked(options={"mirostat": 1}), 400, "mirostat is not supported"),
        ("/api/chat", asked(options={"temperature": "hot"}), 400, "temperature"),
        ("/api/chat", {"model": "pebble", "messages": [{"role": "king"}]}, 400, "'king'"),
        ("/api/generate", {"model": "pebble", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        (
            "/api/generate",
            {"model": "pebble", "prompt": "a", "raw": True, "images": [DATA]},
            400,
            "no place for images",
        ),
        ("/api/generate", {"model": "pebble", "prompt": "a", "images": ["%"]}, 400, "base64"),
        ("/api/show", {"model": "llama9"}, 404, "does not exist"),
    ],
)
def test_errors_are_in_its_form(client, path, body, status, match):
    response = client.post(path, json=body)
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert match in response.json()["error"]


def test_a_program_may_leave_out_what_its_body_is(client):
    body = json.dumps(asked(stream=False)).encode()
    assert client.post("/api/chat", content=body).json()["message"]["content"] == "red"
    page = client.post("/api/chat", content=body, headers={"Origin": "https://example.com"})
    assert page.status_code == 415
