"""`/v1/score` and `/rerank` of a real server: the shapes of their clients, the model's numbers."""

import pytest
import torch

import lapilli
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker, RankTemplate
from lapilli.rank.prompt import POINTWISE
from lapilli.store import StoreWriter
from lapilli.train.build import add_modalities
from tests.modality.declared import DECLARED, tiny_language_model
from tests.serve.conftest import data_uri, picture, serving

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


DOCUMENTS = ["a boat on water", "old tools", "a red square"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_by_their_relevance(client, pebble, path):
    body = {"query": "something that floats", "documents": DOCUMENTS}
    found = client.post(path, json=body).json()
    expected = Ranker(pebble).score(body["query"], DOCUMENTS)
    order = sorted(range(3), key=lambda at: -expected[at])
    assert [one["index"] for one in found["results"]] == order
    for one in found["results"]:
        assert one["relevance_score"] == pytest.approx(float(expected[one["index"]]), abs=1e-3)
        assert one.get("document", {}).get("text") == (
            None if path.startswith("/v2") else DOCUMENTS[one["index"]]
        )
    assert found["usage"]["total_tokens"] > 30
    best = client.post(path, json={**body, "top_n": 1, "return_documents": False}).json()
    assert [one["index"] for one in best["results"]] == order[:1]
    assert "document" not in best["results"][0]


def test_documents_may_be_pictures(client, pebble):
    images = [picture("red"), picture("blue")]
    documents = [
        {"image": data_uri(images[0])},
        {"text": "A circle.", "image": data_uri(images[1])},
        [{"type": "image_url", "image_url": {"url": data_uri(images[1])}}, {"text": "so"}],
    ]
    found = client.post("/rerank", json={"query": "a blue circle", "documents": documents}).json()
    parts = (
        [MediaPart(images[0])],
        [MediaPart(images[1]), "A circle."],
        [MediaPart(images[1]), "so"],
    )
    expected = Ranker(pebble).score("a blue circle", [list(one) for one in parts])
    for one in found["results"]:
        assert one["relevance_score"] == pytest.approx(float(expected[one["index"]]), abs=2e-3)


def test_an_instruction_stands_before(client, pebble):
    body = {"query": "boats", "documents": DOCUMENTS, "instruct": "Be strict."}
    found = client.post("/rerank", json=body).json()["results"]
    said = RankTemplate(user=f"Be strict.\n{POINTWISE}")
    expected = Ranker(pebble, template=said).score("boats", DOCUMENTS)
    for one in found:
        assert one["relevance_score"] == pytest.approx(float(expected[one["index"]]), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": []}, "documents"),
        ({"documents": [" "]}, "documents[0]"),
        ({"query": ""}, "the query is empty"),
        ({"top_n": 0}, "top_n"),
        ({"documents": [{"text": "a", "item_id": "b"}]}, "expected text, image"),
        ({"documents": [{}]}, "has nothing"),
        ({"documents": [{"item_id": "i1"}]}, "stores of no modality"),
        ({"documents": [{"image": "data:,x"}]}, "no picture that can be read"),
        ({"instruct": "{query}"}, "has {query} once"),
        ({"model": "other"}, "does not exist"),
    ],
)
def test_what_cannot_be_ranked_is_refused(client, change, message):
    body = {"query": "boats", "documents": DOCUMENTS, **change}
    response = client.post("/rerank", json=body)
    assert response.status_code == (404 if "model" in change else 400), response.text
    assert message in response.json()["error"]["message"]


def test_ids_of_a_store_stand_for_documents(tmp_path):
    plain = tiny_language_model(tmp_path / "plain")
    add_modalities(str(plain), tmp_path / "model", {"vec": DECLARED["vec"]})
    vectors = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    with StoreWriter(tmp_path / "store", encoder="e-1", dtype="float32") as writer:
        writer.add(["shoe", "hat"], vectors)
    chat = lapilli.load(str(tmp_path / "model"), device="cpu", dtype="float32")
    chat.stores["vec"] = tmp_path / "store"
    expected = Ranker(chat).score("boats", [MediaPart(one, "vec") for one in vectors])
    documents = [{"item_id": "shoe"}, {"item_id": "hat", "modality": "vec"}]
    with serving(chat) as client:
        found = client.post("/rerank", json={"query": "boats", "documents": documents}).json()
        for one in found["results"]:
            assert one["relevance_score"] == pytest.approx(float(expected[one["index"]]), abs=1e-4)
            assert one["document"] == documents[one["index"]]
        for change in ({"item_id": "none"}, {"item_id": "hat", "modality": "user"}):
            body = {"query": "boats", "documents": [change]}
            assert client.post("/rerank", json=body).status_code in (400, 404)
