"""A controller, a worker and a client of the original's demo, over real sockets."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from lapilli.compat import evaluation
from lapilli.compat.serving import Controller, ModelWorker, WorkerInfo, serve


@contextmanager
def running(paths: Any) -> Iterator[str]:
    server = serve("127.0.0.1", 0, paths)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def post(address: str, content: Any = None) -> bytes:
    body = json.dumps(content or {}).encode()
    with urlopen(Request(address, body), timeout=60) as answer:
        return answer.read()


@pytest.fixture
def worker(loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> ModelWorker:
    monkeypatch.setattr(evaluation, "load_pretrained_model", lambda *_, **__: loaded)
    monkeypatch.chdir(tmp_path)
    return ModelWorker("http://nobody", "http://me", "1", True, "llava-v1.5-7b", None, None)


def test_a_client_gets_its_answer_through_the_controller(
    worker: ModelWorker, picture: Image.Image
) -> None:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    prompt = "USER: <image>\nWhat is it? ASSISTANT:"
    request = {
        "model": "llava-v1.5-7b",
        "prompt": prompt,
        "images": [base64.b64encode(file.getvalue()).decode()],
        "temperature": 0,
        "max_new_tokens": 4,
        "stop": "</s>",
    }
    controller = Controller()
    with running(controller.paths()) as at, running(worker.paths()) as there:
        body = {"worker_name": there, "check_heart_beat": True, "worker_status": None}
        assert json.loads(post(f"{at}/register_worker", body)) is True
        assert json.loads(post(f"{at}/list_models")) == {"models": ["llava-v1.5-7b"]}
        found = post(f"{at}/worker_generate_stream", request)
        lines = [json.loads(part) for part in found.split(b"\0") if part]
        assert {line["error_code"] for line in lines} == {0}
        assert lines[-1]["text"].startswith(prompt)
        assert len(lines[-1]["text"]) > len(prompt)
        wrong = post(f"{at}/worker_generate_stream", request | {"images": []})
        assert json.loads(wrong[:-1])["error_code"] == 1
        other = post(f"{at}/worker_generate_stream", request | {"model": "x"})
        assert json.loads(other[:-1])["error_code"] == 2
        with pytest.raises(HTTPError, match="404"):
            post(f"{at}/nothing")
    assert worker.get_queue_length() == 0


def test_a_prompt_that_is_too_long_is_told(worker: ModelWorker) -> None:
    prompt = "word " * 5000
    found = b"".join(worker.generate_stream({"prompt": prompt}))
    assert json.loads(found[:-1])["text"].endswith("Please start a new conversation, thanks.")


def test_requests_go_where_the_queue_is_short() -> None:
    controller = Controller()
    for name, length in (("a", 1), ("b", 0)):
        status = {"model_names": ["m"], "speed": 1, "queue_length": length}
        assert controller.register_worker(name, True, status)
    assert [controller.get_worker_address("m") for _ in range(3)] == ["b", "a", "b"]
    assert controller.get_worker_address("other") == ""
    assert controller.receive_heart_beat("a", 7)
    assert not controller.receive_heart_beat("stranger", 0)
    controller.worker_info["old"] = WorkerInfo(["m"], 1, 0, True, 0.0)
    controller.remove_stale_workers_by_expiration()
    assert sorted(controller.worker_info) == ["a", "b"]
    assert not controller.register_worker("http://127.0.0.1:9", True, None)
