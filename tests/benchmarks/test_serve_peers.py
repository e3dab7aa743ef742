"""The server beside others: what each is given, and that a server that ends says why."""

import io
import sys

import httpx
import pytest
from PIL import Image
from transformers import AutoProcessor

import lapilli
from benchmarks.checkpoint import IMAGE_ID, write_checkpoint
from benchmarks.serve import picture
from benchmarks.serve_peers import QUESTION, SIDE, ask_all, asked, decide, running, with_processor
from lapilli.serve.run import ServerThread


@pytest.mark.slow
def test_transformers_reads_the_same_checkpoint(tmp_path):
    source = write_checkpoint("tiny", tmp_path / "float", layers=1)
    folder = with_processor(source, tmp_path / "out")
    assert with_processor(source, tmp_path / "out") == folder  # written once
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = Image.open(io.BytesIO(picture(0))).resize((SIDE, SIDE))
    found = processor(images=image, text=text, return_tensors="pt")
    assert int((found["input_ids"] == IMAGE_ID).sum()) == (SIDE // 14) ** 2
    assert text.endswith("ASSISTANT:")


def test_requests_are_those_of_a_server():
    with ServerThread(lapilli.load("pebble")) as server:
        bodies = [asked(picture(number), QUESTION, 3) for number in range(3)]
        assert ask_all("lapilli serve", server.url, bodies) == 9
        decide(server.url, picture(0), ["Is there a circle?", "Is there a star?"])
        with pytest.raises(SystemExit, match="400"):
            ask_all("lapilli serve", server.url, [{**bodies[0], "temperature": -1}])


def test_a_server_that_ends_says_why():
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(SystemExit, match="no such model"), running(lambda _: command, "/health"):
        pytest.fail("it is not there")


def test_a_server_runs_until_the_block_is_left():
    def command(port):
        return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]

    with running(command, "/") as address:
        assert httpx.get(address).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
