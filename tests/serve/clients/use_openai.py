"""openai: chat, stream, tools, structured output, files, completions, responses, errors,
decisions, embeddings, and what the library has no method for, by its own post."""

import base64
import json
import sys
from pathlib import Path
from typing import Literal

import openai
from pydantic import BaseModel

url, path = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
uri = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
QUESTION = "What color is the circle?"


class Circle(BaseModel):
    color: Literal["red", "green", "blue"]


PAINT = {
    "name": "paint",
    "description": "Paint a circle.",
    "parameters": {**Circle.model_json_schema(), "additionalProperties": False},
}


def asked(*pictures):
    parts = [{"type": "image_url", "image_url": {"url": one}} for one in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def refusal(error, call):
    """Return the error that a call must end in."""
    try:
        call()
    except error as found:
        return found
    raise AssertionError(f"{error} expected")


def chat():
    create = client.chat.completions.create
    found = create(model=model, messages=asked(uri))
    assert found.choices[0].message.content == "red", found
    assert found.usage.prompt_tokens_details.cached_tokens >= 0
    assert create(model=model, messages=[{"role": "user", "content": "Hi"}]).choices
    chunks = list(
        create(
            model=model,
            messages=asked(uri),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == "red", said
    assert chunks[-1].usage.total_tokens == found.usage.total_tokens
    form = client.chat.completions.parse(model=model, messages=asked(uri), response_format=Circle)
    assert form.choices[0].message.parsed.color in ("red", "green", "blue")


def tools():
    declared = [{"type": "function", "function": PAINT}]
    options = {"model": model, "tools": declared, "max_completion_tokens": 200}
    found = client.chat.completions.create(
        messages=asked(uri), tool_choice="required", parallel_tool_calls=False, **options
    )
    [choice] = found.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert Circle.model_validate_json(call.function.arguments)
    history = [
        *asked(uri),
        choice.message.model_dump(exclude_none=True),
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": [{"type": "image_url", "image_url": {"url": uri}}],
        },
    ]
    found = client.chat.completions.create(messages=history, tool_choice="none", **options)
    assert found.usage.prompt_tokens_details.image_tokens == 2 * 64, found.usage
    named = {"type": "function", "function": {"name": "paint"}}
    with client.chat.completions.stream(
        messages=asked(uri), tool_choice=named, **options
    ) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["color"]


def errors():
    create = client.chat.completions.create
    other = refusal(openai.NotFoundError, lambda: create(model="gpt-9", messages=asked(uri)))
    assert "'gpt-9' does not exist" in other.message
    broken = asked("data:image/png;base64,AAAA")
    wrong = refusal(openai.BadRequestError, lambda: create(model=model, messages=broken))
    assert wrong.code == "invalid_image"


def uploads():
    file = client.files.create(file=Path(path), purpose="vision")
    part = {"type": "input_image", "file_id": file.id, "detail": "auto"}
    content = [part, {"type": "input_text", "text": QUESTION}]
    found = client.responses.create(model=model, input=[{"role": "user", "content": content}])
    assert found.output_text == "red"
    client.files.delete(file.id)
    assert client.completions.create(model=model, prompt="A circle", max_tokens=2).choices


def responses():
    picture = {"type": "input_image", "image_url": uri, "detail": "auto"}
    given = [{"role": "user", "content": [picture, {"type": "input_text", "text": QUESTION}]}]
    found = client.responses.create(model=model, input=given, instructions="Be brief.")
    assert found.output_text == "red"
    assert found.status == "completed"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    with client.responses.stream(model=model, input=given, instructions="Be brief.") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "red"
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    parsed = client.responses.parse(model=model, input=given, text_format=Circle)
    assert parsed.output_parsed.color in ("red", "green", "blue")
    tool = {"type": "function", "strict": True, **PAINT}
    called = client.responses.create(
        model=model, input=given, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    [call] = called.output
    assert Circle.model_validate_json(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": [picture]}
    history = [*given, call.model_dump(exclude_none=True), output]
    again = client.responses.create(model=model, input=history)
    assert again.usage.input_tokens_details.image_tokens == 2 * 64
    cut = client.responses.create(model=model, input=given, max_output_tokens=1)
    assert cut.status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"
    create = client.responses.create
    stored = refusal(openai.BadRequestError, lambda: create(model=model, input=given, store=True))
    assert "stores no responses" in stored.message
    earlier = {"previous_response_id": "resp_1"}
    refusal(openai.BadRequestError, lambda: create(model=model, input=given, **earlier))


def decisions():
    picture = {"type": "input_image", "image_url": uri, "detail": "auto"}
    given = [{"role": "user", "content": [picture, {"type": "input_text", "text": "Look."}]}]
    colors = [{"value": "red"}, {"value": "blue"}]
    questions = [
        {"type": "predicate", "name": "circle", "instructions": "Is there a circle?"},
        {"type": "predicate", "instructions": "Is there a star?"},
        {"type": "choice", "instructions": QUESTION, "choices": colors, "spelled": True},
        {"type": "score", "instructions": "How many?", "levels": [{"label": "0"}, {"label": "1"}]},
    ]
    asked_for = {"model": model, "input": given, "questions": questions}
    raw = client.post("/decisions", cast_to=object, body=asked_for)
    assert [one["type"] for one in raw["answers"]] == ["predicate", "predicate", "choice", "score"]
    assert raw["answers"][0]["probability"] > 0.9 > 0.1 > raw["answers"][1]["probability"]
    assert raw["answers"][2]["choice"] == "red", raw
    if hasattr(client, "decisions"):  # older versions of the library have no such method
        found = client.decisions.create(**asked_for)
        circle, star, color, count = found.answers
        assert circle.name == "circle"
        assert circle.probability > 0.9 > 0.1 > star.probability
        assert color.choice == "red"
        assert [one.value for one in color.probabilities] == ["red", "blue"]
        assert count.score == count.probabilities[1].probability
        assert found.usage.input_tokens == raw["usage"]["input_tokens"] > 64
    many = {**asked_for, "questions": questions * 101}
    wrong = refusal(
        openai.BadRequestError, lambda: client.post("/decisions", cast_to=object, body=many)
    )
    assert "questions" in wrong.message


def embeddings():
    plain = client.embeddings.create(model=model, input=["a red boat", "tools"])
    floats = client.embeddings.create(model=model, input="a red boat", encoding_format="float")
    first, last = (one.embedding for one in plain.data)
    assert len(first) == len(last) == len(floats.data[0].embedding)
    assert max(abs(a - b) for a, b in zip(first, floats.data[0].embedding, strict=True)) < 1e-3
    assert plain.usage.prompt_tokens > floats.usage.prompt_tokens > 0


def scores():
    body = {"query": "a red boat", "items": ["yes", "no", "is"], "label_token_ids": [5, 17]}
    found = client.post("/score", cast_to=object, body={"model": model, **body})
    assert [len(one) for one in found["scores"]] == [2, 2, 2]


for part in (chat, tools, errors, uploads, responses, decisions, embeddings, scores):
    part()
print("all of it answered")
