"""`/v1/responses`: items, events in their order, what is refused."""

import json

import pytest

from tests.serve.conftest import data_uri, picture

QUESTION = "What color is the circle?"
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}
PAINT = {"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True}


def shown(data=None):
    return {"type": "input_image", "image_url": data_uri(data or picture()), "detail": "auto"}


def asked(**options):
    content = [shown(), {"type": "input_text", "text": QUESTION}]
    return {"model": "pebble", "input": [{"role": "user", "content": content}], **options}


def post(client, body):
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client, body):
    """Return the events of a stream; their names are those of their data."""
    text = client.post("/v1/responses", json={**body, "stream": True}).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    return found


def test_a_text_is_answered_like_the_messages_of_chat(client):
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    expected = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    [item] = post(client, {"model": "pebble", "input": "Hello"})["output"]
    assert item["content"][0]["text"] == expected["content"]


def test_the_events_tell_the_response(client):
    whole = post(client, asked(instructions="Be brief."))
    events = streamed(client, asked(instructions="Be brief."))
    assert [one["type"].removeprefix("response.") for one in events if "delta" not in one] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    text = "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta")
    final = events[-1]["response"]
    assert text == final["output"][0]["content"][0]["text"] == "red"
    assert whole["output"][0]["content"] == final["output"][0]["content"]
    assert whole["usage"]["total_tokens"] == final["usage"]["total_tokens"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert (final["status"], final["store"], final["error"]) == ("completed", False, None)


def test_a_call_has_events_of_its_own(client):
    options = {"tools": [PAINT], "tool_choice": "required", "parallel_tool_calls": False}
    events = streamed(client, asked(**options))
    kinds = [one["type"].removeprefix("response.") for one in events if "delta" not in one]
    assert kinds[2:-1] == [
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
    ]
    arguments = "".join(one["delta"] for one in events if "delta" in one)
    [item] = events[-1]["response"]["output"]
    assert item["type"] == "function_call"
    assert item["arguments"] == arguments
    assert json.loads(arguments)["color"] in ("red", "blue")


def test_pictures_of_a_function_are_counted(client):
    call = {"type": "function_call", "call_id": "c1", "name": "paint", "arguments": "{}"}
    body = asked()
    body["input"] += [call, {"type": "function_call_output", "call_id": "c1", "output": [shown()]}]
    usage = post(client, body)["usage"]
    assert usage["input_tokens_details"]["image_tokens"] == 2 * 64
    body["input"][-1]["output"] = "painted"
    usage = post(client, body)["usage"]
    assert usage["input_tokens_details"]["image_tokens"] == 64


def test_a_schema_holds_for_a_question_about_a_picture(client):
    form = {"type": "json_schema", "name": "circle", "schema": SCHEMA, "strict": True}
    [item] = post(client, asked(text={"format": form}))["output"]
    assert json.loads(item["content"][0]["text"])["color"] in ("red", "blue")


def test_an_answer_that_is_cut_is_incomplete(client):
    whole = post(client, asked(max_output_tokens=1))
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert streamed(client, asked(max_output_tokens=1))[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"store": True}, "store is not supported: this server stores no responses"),
        ({"previous_response_id": "resp_1"}, "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "never cut"),
        ({"tools": [{"type": "web_search"}]}, "functions of yours only"),
        ({"input": []}, "input is empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "expected message"),
        ({"input": [{"role": "king", "content": "a"}]}, "has the role 'king'"),
        ({"input": [{"role": "user", "content": [3]}]}, "a list of parts"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "'input_file'"),
        ({"text": {"format": {"type": "xml"}}}, "expected text, json_object"),
        ({"top_logprobs": 3}, "ask /v1/chat/completions"),
    ],
)
def test_what_is_refused(client, options, match):
    response = client.post("/v1/responses", json={**asked(), **options})
    assert response.status_code == 400
    assert match in response.json()["error"]["message"]


def test_not_storing_is_what_it_does(client):
    assert post(client, asked(store=False))["store"] is False
    assert post(client, asked())["store"] is False
