"""`detail` of a picture: "low" is the whole picture in one tile, where a model has several."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

import lapilli
from tests.serve.conftest import data_uri, picture, serving

PATH = "/v1/chat/completions"
URI = data_uri(picture("red", 200))


@pytest.fixture(scope="module")
def tiled(
    conformance: Path, maker: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A server of a tiny random model of the kind of LLaVA 1.6."""
    wanted = conformance / "cases" / "open" / "llava-v1.6-vicuna-tiny-336" / "spec.json"
    made = maker.build(json.loads(wanted.read_text("utf-8")), str(tmp_path_factory.mktemp("m")))
    with serving(lapilli.load(str(made["model_path"]))) as client:
        yield client


def image_tokens(client, part, **rest):
    content = [part, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **rest}
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return usage["prompt_tokens_details"]["image_tokens"], usage["prompt_tokens"]


def of(detail=None, **rest):
    url = {"url": URI} | ({} if detail is None else {"detail": detail})
    return {"type": "image_url", "image_url": url, **rest}


def test_low_is_one_tile_and_counted_so(tiled):
    modality = tiled.app.state.service.chat.model.modality("image")
    [whole, prompt], [low, short] = image_tokens(tiled, of()), image_tokens(tiled, of("low"))
    assert low == modality.tile.number + (modality.image_newline is not None) < whole
    assert prompt - short == whole - low
    assert image_tokens(tiled, of("high")) == image_tokens(tiled, of("auto")) == (whole, prompt)
    assert image_tokens(tiled, of()) == (whole, prompt)  # the overview is not kept for it


def test_low_is_said_beside_the_picture_too(tiled):
    low = image_tokens(tiled, of("low"))
    beside = {"type": "input_image", "image_url": URI, "detail": "low"}
    assert image_tokens(tiled, beside) == low
    file = tiled.post("/v1/files", files={"file": ("a.png", picture("red", 200), "image/png")})
    uploaded = {"type": "input_image", "file_id": file.json()["id"], "detail": "low"}
    assert image_tokens(tiled, uploaded) == low
    assert image_tokens(tiled, of(uuid="seen"))[0] > low[0]
    named = {"type": "image_url", "image_url": None, "uuid": "seen", "detail": "low"}
    assert image_tokens(tiled, named) == low


def test_responses_and_decisions_follow_it(tiled):
    counts = []
    for detail in ("high", "low"):
        part = {"type": "input_image", "image_url": URI, "detail": detail}
        given = [{"role": "user", "content": [part, {"type": "input_text", "text": "What?"}]}]
        body = {"model": tiled.get("/v1/models").json()["data"][0]["id"], "input": given}
        said = tiled.post("/v1/responses", json={**body, "max_output_tokens": 1}).json()
        questions = [{"type": "predicate", "instructions": "Is it red?"}]
        decided = tiled.post("/v1/decisions", json={**body, "questions": questions}).json()
        counts.append([one["usage"]["input_tokens"] for one in (said, decided)])
    assert counts[0][0] - counts[1][0] == counts[0][1] - counts[1][1] > 0


@pytest.mark.parametrize("detail", ["low", "high", "auto", "original", None, 7])
def test_a_model_of_one_tile_sees_the_same(client, detail):
    url = {"url": data_uri(picture("red")), "detail": detail}
    content = [{"type": "image_url", "image_url": url}]
    content.append({"type": "text", "text": "What color is the circle?"})
    response = client.post(PATH, json={"messages": [{"role": "user", "content": content}]})
    found = response.json()
    assert found["choices"][0]["message"]["content"] == "red"
    assert found["usage"]["prompt_tokens_details"]["image_tokens"] == 64
