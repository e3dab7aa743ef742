"""`/v1/score` of a real server: the shapes of its clients, the model's numbers."""

import pytest
import torch

from lapilli.prompt.encode import EncodedPrompt, Span
from tests.serve.conftest import data_uri, picture

LABELS = [5, 17, 60]


@torch.inference_mode()
def logits_of(chat, ids, vectors=()) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the last state of a whole sequence, read alone."""
    spans = tuple(Span(0, at, 1) for at, _ in vectors)
    prompt = EncodedPrompt(ids, [False] * len(ids), spans)
    hidden = chat.model(chat.model.embed_prompts([prompt], [[one for _, one in vectors]]))[0, -1]
    return chat.model.logits(hidden).float(), hidden.float()


def apart(chat, query: str, item: str) -> list[int]:
    encode = chat.tokenizer.encode
    return [*encode(query), *encode(item, add_bos=False)]


def score(client, **body):
    response = client.post("/v1/score", json={"label_token_ids": LABELS, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_scores_are_probabilities_of_label_tokens(client, pebble):
    query, items = "a red boat", ["is it", "large", "no"]
    found = score(client, query=query, items=items, return_token_logprobs=True)
    soft = score(client, query=query, items=items, apply_softmax=True, temperature=2.0)
    states = score(client, query=query, items=items, return_pooled_hidden_states=True)
    for at, item in enumerate(items):
        logits, hidden = logits_of(pebble, apart(pebble, query, item))
        shares = logits.softmax(-1)[LABELS]
        assert found["scores"][at] == pytest.approx(shares.tolist(), abs=1e-4)
        assert found["token_logprobs"][at] == pytest.approx(shares.log().tolist(), abs=1e-2)
        halved = (logits[LABELS] / 2).softmax(-1)
        assert soft["scores"][at] == pytest.approx(halved.tolist(), abs=1e-3)
        near = torch.tensor(states["pooled_hidden_states"][at])
        torch.testing.assert_close(near, hidden, atol=5e-2, rtol=0)
    assert found["object"] == "scoring"
    lengths = [len(pebble.tokenizer.encode(item, add_bos=False)) for item in items]
    expected = len(pebble.tokenizer.encode(query)) + sum(lengths)
    assert found["usage"]["prompt_tokens"] == expected
    assert found["token_logprobs"] is not None
    assert soft["token_logprobs"] is None


def test_items_may_stand_first_and_have_labels_of_their_own(client, pebble):
    query, items, labels = "is it red", ["a boat", "tools"], [[3, 4], [9]]
    found = score(client, query=query, items=items, label_token_ids=labels, item_first=True)
    for item, ids, scores in zip(items, labels, found["scores"], strict=True):
        logits, _ = logits_of(pebble, apart(pebble, item, query))
        assert scores == pytest.approx(logits.softmax(-1)[ids].tolist(), abs=1e-4)


def test_vectors_stand_for_tokens(client, pebble):
    width = pebble.model.language_model.config.hidden_size
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    found = score(
        client,
        query=[1, 50, 7, 30],
        items=[[50, 9], [8, 9]],
        embed_override_token_id=50,
        query_embed_overrides=[vectors[0].tolist()],
        item_embed_overrides=[[vectors[1].tolist()], None],
    )
    places = [[(1, vectors[:1]), (4, vectors[1:])], [(1, vectors[:1])]]
    for item, where, scores in zip([[50, 9], [8, 9]], places, found["scores"], strict=True):
        logits, _ = logits_of(pebble, [1, 50, 7, 30, *item], where)
        assert scores == pytest.approx(logits.softmax(-1)[LABELS].tolist(), abs=1e-4)


def test_scores_are_read_at_every_place_of_a_token(client, pebble):
    items = [[8, 33, 9, 33], [33, 4]]
    token = pebble.tokenizer.id_to_token(33)
    found = score(client, query=[1, 7], items=items, score_extraction_token=token)
    assert [len(one) for one in found["scores"]] == [2, 1]
    for item, rows in zip(items, found["scores"], strict=True):
        ends = [at + 1 for at, one in enumerate(item) if one == 33]
        for end, scores in zip(ends, rows, strict=True):
            logits, _ = logits_of(pebble, [1, 7, *item[:end]])
            assert scores == pytest.approx(logits.softmax(-1)[LABELS].tolist(), abs=1e-4)


def test_a_query_may_hold_a_picture(client):
    image = {"type": "image_url", "image_url": {"url": data_uri(picture("red"))}}
    query = [image, {"type": "text", "text": "Is it"}]
    [[red, *_]] = score(client, query=query, items=["red"])["scores"]
    image = {"type": "image_url", "image_url": {"url": data_uri(picture("blue"))}}
    [[blue, *_]] = score(client, query=[image, query[1]], items=["red"])["scores"]
    assert red != blue


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "items is empty"),
        ({"label_token_ids": [10**6]}, "is no token"),
        ({"label_token_ids": []}, "must be a list of tokens"),
        ({"label_token_ids": [[1], [2], [3]]}, "got 3 lists"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": 1e-300}, "temperature"),
        ({"query": ""}, None),
        ({"query": [], "items": ["a"]}, "both need a text"),
        ({"query": [1, 10**6]}, "is no token"),
        ({"query": "red " * 3000}, "the model reads"),
        ({"query_embed_overrides": [[1.0]]}, "embed_override_token_id is missing"),
        ({"query_embed_overrides": [[1.0]], "embed_override_token_id": 3}, "expected a vector of"),
        ({"item_embed_overrides": []}, "give one entry"),
        ({"score_extraction_token": "no such token"}, "is no token"),
        ({"model": "other"}, "does not exist"),
    ],
)
def test_scores_that_cannot_be_read_are_refused(client, change, message):
    body = {"query": "a", "items": ["b", "c"], "label_token_ids": LABELS, **change}
    response = client.post("/v1/score", json=body)
    if message is None:  # the first token of a text stands before everything
        assert response.status_code == 200
        return
    assert response.status_code == (404 if "model" in change else 400), response.text
    assert message in response.json()["error"]["message"]
