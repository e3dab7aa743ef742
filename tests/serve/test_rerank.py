"""`/rerank` of a real server: the shapes of its clients, the ranker's numbers."""

import pytest
import torch

import lapilli
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker, RankTemplate
from lapilli.rank.prompt import POINTWISE
from lapilli.store import StoreWriter
from lapilli.train.build import add_modalities
from tests.modality.declared import DECLARED, tiny_language_model
from tests.serve.conftest import data_uri, picture, serving

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
