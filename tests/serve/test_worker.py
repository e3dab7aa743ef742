"""What front ends of the original ask: the prompt and all text so far, zero bytes between."""

import base64
import json

from lapilli.config.generation import SamplingParams
from lapilli.prompt.message import Message
from tests.serve.conftest import picture


def lines(response):
    assert response.status_code == 200, response.text
    return [json.loads(one) for one in response.content.split(b"\0") if one]


def rendered(pebble, question):
    """Return the prompt that the model's own template makes, pictures as `<image>`."""
    segments = pebble.template.render([Message.user(question, picture("green"))])
    return "".join(getattr(segment, "text", "<image>") for segment in segments)


def test_a_front_end_gets_the_prompt_and_the_answer_of_the_library(client, pebble):
    question = "What is in this picture?"
    prompt = rendered(pebble, question)
    body = {
        "model": "pebble",
        "prompt": prompt,
        "images": [base64.b64encode(picture("green")).decode()],
        "temperature": 0.0,
        "max_new_tokens": 64,
        "stop": pebble.template.stop[0] if pebble.template.stop else None,
    }
    found = lines(client.post("/worker_generate_stream", json=body))
    assert all(one["error_code"] == 0 and one["text"].startswith(prompt) for one in found)
    params = SamplingParams(max_new_tokens=64)
    answer = pebble.answer([Message.user(question, picture("green"))], params).text
    assert found[-1]["text"].removeprefix(prompt).strip() == answer.strip()
    assert len(found) > 2


def test_pictures_without_a_place_are_refused(client):
    body = {"prompt": "USER: Hi ASSISTANT:", "images": [base64.b64encode(picture()).decode()]}
    response = client.post("/worker_generate_stream", json=body)
    assert response.status_code == 400
    assert "0 <image> but 1 pictures" in response.json()["error"]["message"]


def test_the_status_names_the_model(client):
    found = client.post("/worker_get_status", json={}).json()
    assert found == {"model_names": ["pebble"], "speed": 1, "queue_length": 0}


def test_the_model_of_a_request_is_not_looked_at_as_in_the_original(client):
    body = {"model": "llava-v1.5-13b", "prompt": "A red", "max_new_tokens": 2, "temperature": 0}
    other = lines(client.post("/worker_generate_stream", json=body))
    assert other == lines(client.post("/worker_generate_stream", json=body | {"model": "pebble"}))
    assert other[-1]["error_code"] == 0
