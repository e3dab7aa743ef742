"""`/v1/messages`: blocks, events in their order, exact counts, no picture lost."""

import base64
import json

import pytest

from tests.serve.conftest import picture

DATA = base64.b64encode(picture()).decode()
PICTURE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": DATA},
}
QUESTION = {"type": "text", "text": "What color is the circle?"}
PAINT = {
    "name": "paint",
    "input_schema": {
        "type": "object",
        "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
        "required": ["color"],
    },
}
CALL = {"type": "tool_use", "id": "c1", "name": "paint", "input": {"color": "red"}}


def asked(*blocks, **options):
    content = list(blocks) or [PICTURE, QUESTION]
    messages = [{"role": "user", "content": content}]
    return {"model": "pebble", "max_tokens": 100, "messages": messages, **options}


def post(client, body):
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def count(client, body):
    given = {name: value for name, value in body.items() if name not in ("max_tokens", "stream")}
    return client.post("/v1/messages/count_tokens", json=given).json()["input_tokens"]


def streamed(client, body):
    text = client.post("/v1/messages", json={**body, "stream": True}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_the_events_tell_the_message(client):
    whole = post(client, asked())
    events = streamed(client, asked())
    assert [one["type"] for one in events if one["type"] != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    said = "".join(one["delta"]["text"] for one in events if "text" in one.get("delta", {}))
    assert whole["content"] == [{"type": "text", "text": said}]
    assert said == "red"
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


HISTORY = [
    {"role": "user", "content": [PICTURE, QUESTION]},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "?"}, CALL]},
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [PICTURE], "is_error": True},
            QUESTION,
        ],
    },
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system": "Be brief."},
        {"system": [{"type": "text", "text": "Be brief.", "cache_control": {}}]},
        {"tools": [PAINT], "system": "Be brief."},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": HISTORY},
    ],
)
def test_the_count_is_that_of_the_answer(client, options):
    body = asked(**options)
    for _ in range(2):  # the second time from caches
        assert count(client, body) == post(client, body)["usage"]["input_tokens"]


def test_a_conversation_that_is_too_long_says_how_long_it_is(client):
    body = asked({"type": "text", "text": "circle " * 2100})
    given = {"model": "pebble", "messages": body["messages"]}
    for path, sent in (("/v1/messages", body), ("/v1/messages/count_tokens", given)):
        response = client.post(path, json=sent)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert "has 2135 tokens" in error["message"]


@pytest.mark.parametrize(
    "where",
    [
        lambda part: [part, QUESTION],
        lambda part: [{"type": "tool_result", "tool_use_id": "c1", "content": [part]}, QUESTION],
    ],
    ids=["message", "tool_result"],
)
def test_no_picture_is_dropped(client, where):
    """One more picture takes its positions, wherever it stands; one that is none is refused."""
    text = {"type": "text", "text": ""}
    with_picture, without = (count(client, asked(*where(part))) for part in (PICTURE, text))
    assert with_picture - without >= 64
    broken = {"type": "image", "source": {**PICTURE["source"], "data": "AAAA"}}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        response = client.post(path, json=asked(*where(broken)))
        assert response.status_code == 400
        assert response.json()["type"] == "error"


def test_pictures_by_file_and_by_url(client, serve):
    files = {"file": ("a.png", picture(), "image/png")}
    file_id = client.post("/v1/files", files=files).json()["id"]
    part = {"type": "image", "source": {"type": "file", "file_id": file_id}}
    assert post(client, asked(part, QUESTION))["content"][0]["text"] == "red"
    part = {"type": "image", "source": {"type": "url", "url": f"data:image/png;base64,{DATA}"}}
    assert post(client, asked(part, QUESTION))["content"][0]["text"] == "red"
    part = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    response = client.post("/v1/messages", json=asked(part, QUESTION))
    assert response.status_code == 400
    assert "fetches no pictures" in response.json()["error"]["message"]


def test_reasons_to_stop(client):
    found = post(client, asked(stop_sequences=["x", "ed"]))
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "ed")
    assert found["content"] == [{"type": "text", "text": "r"}]
    found = post(client, asked(max_tokens=1))
    assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
    assert post(client, asked(max_tokens=32_000))["stop_reason"] == "end_turn"


@pytest.mark.parametrize("kind", [{"type": "any"}, {"type": "tool", "name": "paint"}])
def test_a_required_call(client, kind):
    choice = {**kind, "disable_parallel_tool_use": True}
    body = asked(tools=[PAINT], tool_choice=choice, max_tokens=200)
    whole = post(client, body)
    [block] = whole["content"]
    assert whole["stop_reason"] == "tool_use"
    assert block["input"]["color"] in ("red", "blue")
    events = streamed(client, body)
    pieces = [one["delta"].get("partial_json", "") for one in events if "delta" in one]
    assert json.loads("".join(pieces)) == block["input"]
    assert events[1]["content_block"]["input"] == {}


def test_a_form(client):
    form = {"type": "json_schema", "schema": {"type": "integer", "minimum": 0, "maximum": 9}}
    for options in ({"output_config": {"format": form}}, {"output_format": form}):
        [block] = post(client, asked(**options))["content"]
        assert block["text"].isdigit()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (asked({"type": "document"}), "expected text, image, tool_use or tool_result"),
        (asked({"type": "image", "source": {"type": "ftp"}}), "expected base64, url or file"),
        (asked(system=[PICTURE]), "system holds a picture"),
        (asked(messages=[]), "messages is empty"),
        (asked(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "runs no tools"),
        (asked(tool_choice={"type": "some"}), "tool_choice has the type"),
        (asked(stop_sequences=["x"] * 65), "the limit is 64"),
    ],
)
def test_what_is_refused(client, body, match):
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 400
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert match in error["error"]["message"]
