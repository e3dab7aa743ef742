"""ollama: chat, generate, streams, tools, forms, what there is, errors."""

import json
import sys

import ollama

url, path = sys.argv[1:]
client = ollama.Client(host=url)
QUESTION = "What color is the circle?"
MESSAGES = [{"role": "user", "content": QUESTION, "images": [path]}]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}


def refusal(error, call):
    """Return the error that a call must end in."""
    try:
        call()
    except error as found:
        return found
    raise AssertionError(f"{error} expected")


[model] = client.list().models
assert model.model == "pebble:latest"
assert "vision" in client.show("pebble").capabilities
assert client.ps().models

found = client.chat("pebble", MESSAGES)
assert found.message.content == "red", found
assert found.done_reason == "stop"
assert found.prompt_eval_count > 64
assert found.total_duration >= found.eval_duration > 0
lines = list(client.chat("pebble", MESSAGES, stream=True))
assert "".join(line.message.content for line in lines) == "red"
assert lines[-1].eval_count == found.eval_count
assert client.generate("pebble", QUESTION, images=[path]).response == "red"
pieces = [
    piece.response for piece in client.generate("pebble", QUESTION, images=[path], stream=True)
]
assert "".join(pieces) == "red"
short = client.chat("pebble", MESSAGES, options={"num_predict": 1, "temperature": 0})
assert short.done_reason == "length"
form = client.chat("pebble", MESSAGES, format=SCHEMA)
assert json.loads(form.message.content)["color"] in ("red", "blue")

tool = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
assert client.chat("pebble", MESSAGES, tools=[tool]).message.content is not None
call = {"function": {"name": "paint", "arguments": {"color": "red"}}}
history = [
    *MESSAGES,
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "content": "painted", "images": [path], "tool_name": "paint"},
]
again = client.chat("pebble", history)
assert again.prompt_eval_count > found.prompt_eval_count + 64

broken = [{**MESSAGES[0], "images": [b"broken"]}]
assert refusal(ollama.ResponseError, lambda: client.chat("llama9", MESSAGES)).status_code == 404
assert refusal(ollama.ResponseError, lambda: client.chat("pebble", broken)).status_code == 400
print("all of it answered")
