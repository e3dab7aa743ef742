"""`/v1/completions`: prompts without a conversation, and how much of them is taken."""

import re

import pytest

import lapilli
from lapilli.generate.engine import EngineOptions
from tests.serve.conftest import serving

PATH = "/v1/completions"


def refused(client, body):
    response = client.post(PATH, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    ("body", "param", "match"),
    [
        ({"prompt": "a", "logprobs": 1000}, "logprobs", "logprobs must be from 0 to 20, got 1000"),
        ({"prompt": "a", "logprobs": -1}, "logprobs", "from 0 to 20"),
        ({"prompt": ["a", "b"], "stream": True}, "prompt", "2 prompts cannot be streamed"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of", "best_of is not supported"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": ["a"] * 5000}, "prompt", "5000 prompts in one request, this server takes 1024"),
        ({"prompt": ["a"] * 65, "n": 16}, "prompt", "65 prompts with 16 answers each"),
    ],
)
def test_what_is_refused(client, body, param, match):
    error = refused(client, body)
    assert error["param"] == param
    assert match in error["message"]


def test_as_many_prompts_as_the_engine_takes_are_answered():
    chat = lapilli.load("pebble", engine=EngineOptions(max_waiting=3))
    with serving(chat) as client:
        body = {"prompt": ["a"] * 3, "max_tokens": 1}
        response = client.post(PATH, json=body)
        assert response.status_code == 200, response.text
        assert [one["index"] for one in response.json()["choices"]] == [0, 1, 2]
        error = refused(client, body | {"prompt": ["a"] * 4})
        assert "4 prompts in one request, this server takes 3 answers" in error["message"]


@pytest.mark.parametrize("most", [None, 5])
@pytest.mark.parametrize("prompt", [[5] * 200_002, "red " * 60_000])
def test_a_prompt_that_does_not_fit_says_so_itself(client, prompt, most):
    error = refused(client, {"prompt": prompt, "max_tokens": most})
    assert error["code"] == "context_length_exceeded"
    assert re.search(r"prompt has 2?\d{5,6} tokens, .*(shorten|send less)", error["message"])
    assert "-" not in error["message"]


def test_log_probabilities_are_as_many_as_asked_for(client):
    body = {"prompt": "A red", "max_tokens": 2, "logprobs": 20, "temperature": 0}
    [choice] = client.post(PATH, json=body).json()["choices"]
    found = choice["logprobs"]["top_logprobs"]
    assert len(found) == 2
    assert all(10 < len(one) <= 20 for one in found)  # tokens of half a letter have one name
