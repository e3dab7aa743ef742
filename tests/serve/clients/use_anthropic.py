"""anthropic: messages, streams, pictures in every place, tools, exact counts, errors."""

import base64
import sys
from pathlib import Path

import anthropic

url, path = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
data = base64.b64encode(Path(path).read_bytes()).decode()
SOURCE = {"type": "base64", "media_type": "image/png", "data": data}
PICTURE = {"type": "image", "source": SOURCE}
QUESTION = {"type": "text", "text": "What color is the circle?"}
MESSAGES = [{"role": "user", "content": [PICTURE, QUESTION]}]
PAINT = {
    "name": "paint",
    "description": "Paint a circle.",
    "input_schema": {
        "type": "object",
        "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
        "required": ["color"],
        "additionalProperties": False,
    },
}
options = {"model": "pebble", "max_tokens": 200}


def refusal(error, call):
    """Return the error that a call must end in."""
    try:
        call()
    except error as found:
        return found
    raise AssertionError(f"{error} expected")


found = client.messages.create(messages=MESSAGES, **options)
assert found.content[0].text == "red", found
assert found.stop_reason == "end_turn"
count = client.messages.count_tokens(model="pebble", messages=MESSAGES)
assert count.input_tokens == found.usage.input_tokens > 64

with client.messages.stream(messages=MESSAGES, system="Be brief.", **options) as stream:
    said = "".join(stream.text_stream)
    final = stream.get_final_message()
assert said == final.content[0].text == "red"
assert final.usage.output_tokens > 0

stopped = client.messages.create(messages=MESSAGES, stop_sequences=["ed"], **options)
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "ed"), stopped
assert stopped.content[0].text == "r"

tools = {"tools": [PAINT], **options}
choice = {"type": "any", "disable_parallel_tool_use": True}
called = client.messages.create(messages=MESSAGES, tool_choice=choice, **tools)
assert called.stop_reason == "tool_use"
[call] = called.content
assert call.input["color"] in ("red", "blue")
with client.messages.stream(messages=MESSAGES, tool_choice=choice, **tools) as stream:
    [again] = stream.get_final_message().content
assert again.input == call.input

result = {"type": "tool_result", "tool_use_id": call.id, "content": [PICTURE]}
history = [
    *MESSAGES,
    {"role": "assistant", "content": called.content},
    {"role": "user", "content": [result, QUESTION]},
]
one = client.messages.count_tokens(model="pebble", messages=MESSAGES).input_tokens
both = client.messages.count_tokens(model="pebble", messages=history).input_tokens
assert both > one + 64, (one, both)  # the picture of the tool is seen
answer = client.messages.create(messages=history, **options)
assert answer.usage.input_tokens == both

broken = [{"type": "image", "source": {**SOURCE, "data": "AAAA"}}]
create = client.messages.create
other = refusal(
    anthropic.NotFoundError, lambda: create(model="claude-9", max_tokens=8, messages=MESSAGES)
)
assert other.body["error"]["type"] == "not_found_error"
wrong = refusal(
    anthropic.BadRequestError,
    lambda: create(messages=[{"role": "user", "content": broken}], **options),
)
assert wrong.body["error"]["message"]
print("all of it answered")
