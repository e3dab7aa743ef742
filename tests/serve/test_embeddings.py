"""`/v1/embeddings` of a real server: OpenAI's shape, the library's vectors."""

import base64

import numpy as np
import pytest
import torch

from lapilli.prompt.message import MediaPart, Message
from tests.serve.conftest import data_uri, picture


def post(client, **body):
    return client.post("/v1/embeddings", json={"model": "pebble", **body})


def vectors(response) -> torch.Tensor:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return torch.tensor([one["embedding"] for one in data])


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_texts_and_tokens_are_vectors(client, pebble):
    texts = ["a red boat", "tools"]
    expected = pebble.embed(texts)
    response = post(client, input=texts)
    close(vectors(response), expected)
    tokens = [pebble.tokenizer.encode(text, add_bos=False) for text in texts]
    close(vectors(post(client, input=tokens)), expected)
    close(vectors(post(client, input=tokens[0])), expected[:1])
    close(vectors(post(client, input=texts[0], dimensions=256)), expected[:1])
    total = sum(len(pebble.tokenizer.encode(text)) for text in texts)
    assert response.json()["usage"] == {"prompt_tokens": total, "total_tokens": total}


def test_base64_holds_the_same_numbers(client):
    plain = vectors(post(client, input="a red boat"))[0]
    [data] = post(client, input="a red boat", encoding_format="base64").json()["data"]
    found = np.frombuffer(base64.b64decode(data["embedding"]), dtype="<f4")
    assert found.tolist() == pytest.approx(plain.tolist(), abs=1e-6)


def test_pictures_and_messages_are_vectors(client, pebble):
    image = picture("red")
    parts = [
        {"type": "image_url", "image_url": {"url": data_uri(image)}},
        {"type": "text", "text": "a circle"},
    ]
    close(vectors(post(client, input=[parts])), pebble.embed([[MediaPart(image), "a circle"]]))
    said = [{"role": "user", "content": parts}]
    expected = pebble.embed([[Message.user("a circle", image)]])
    close(vectors(post(client, messages=said)), expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either input or messages"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "either input"),
        ({"input": []}, "1 to 2048"),
        ({"input": " "}, "is empty"),
        ({"input": [[10**6]]}, "tokens from 0"),
        ({"input": [1]}, "input[0] has no tokens behind those that every text begins with (1)"),
        ({"input": [[1, 306], [1]]}, "input[1] has no tokens behind"),
        ({"input": "a", "dimensions": 3}, "dimensions must be 256"),
        ({"input": "red " * 3000}, "shorten it"),
        ({"input": [[{"type": "sound"}]]}, "input"),
    ],
)
def test_what_is_wrong_is_said(client, body, message):
    response = post(client, **body)
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
