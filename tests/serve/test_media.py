"""The table of media errors: a status, a cause, and other requests that are not touched.

Each row is something that a server of the field got wrong.
"""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from lapilli.errors import MediaError
from lapilli.media import download
from lapilli.media.download import is_public
from lapilli.prompt.message import MediaPart
from lapilli.serve.media import one_tensor
from lapilli.serve.options import ApiKey, Limits
from tests.serve.conftest import asked, data_uri, picture

QUESTION = "What color is the circle?"
PATH = "/v1/chat/completions"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def good(client):
    """Ask what every server must still answer."""
    response = client.post(PATH, json=asked(QUESTION, data_uri(picture("red"))))
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "red"


def refused(client, body, status, *causes, path=PATH):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    for cause in causes:
        assert cause in message, message
    good(client)


def encoded(kind, **options):
    image = Image.open(io.BytesIO(picture("red")))
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (encoded("JPEG")[:400], "damaged or cut off"),
        (picture()[:200], "damaged or cut off"),
        (b"", "empty"),
        (b"just some text, no picture at all", "no picture that can be read"),
        (SVG, "SVG"),
        (HEIC, "HEIC"),
        (b"%PDF-1.7 ...............................", "PDF"),
    ],
)
def test_what_is_no_picture_is_400_with_the_cause(client, data, cause):
    refused(client, asked(QUESTION, data_uri(data)), 400, cause)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF", "PNG"])
def test_other_formats_are_pictures_too(client, kind):
    body = asked(QUESTION, data_uri(encoded(kind), f"image/{kind.lower()}"))
    response = client.post(PATH, json=body)
    assert response.json()["choices"][0]["message"]["content"] == "red"


def test_base64_may_come_without_its_prefix(client):
    bare = base64.b64encode(picture("blue")).decode()
    response = client.post(PATH, json=asked(QUESTION, bare))
    assert response.json()["choices"][0]["message"]["content"] == "blue"


@pytest.mark.parametrize(
    ("url", "status", "cause"),
    [
        ("http://example.com/a.png", 400, "--allow-remote-images"),
        ("file:///etc/passwd", 400, "--media-root"),
        ("/etc/passwd", 400, "no data URI"),
        ("ftp://example.com/a.png", 400, "no data URI"),
        ("data:image/png;base64,@@@@", 400, "not valid base64"),
        ("data:image/png", 400, "no ','"),
        ("", 400, "image_url"),
        (7, 400, "must be a text"),
        ("file-1234", 404, "upload it again"),
    ],
)
def test_a_url_that_leads_nowhere(client, url, status, cause):
    refused(client, asked(QUESTION, url), status, cause)


def test_a_part_without_a_picture(client):
    body = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    refused(client, body, 400, "no image_url, file_id or uuid")
    body["messages"][0]["content"][0]["type"] = "video_url"
    refused(client, body, 400, "messages[0].content[0]", "video_url")


def test_too_many_pixels_and_bytes_are_413(serve):
    client = serve(limits=Limits(image_pixels=20_000, image_bytes=5_000))
    refused(client, asked(QUESTION, data_uri(picture(size=400))), 413, "pixels")
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    refused(client, asked(QUESTION, data_uri(out.getvalue())), 413, "bytes")


def test_a_bomb_is_refused_before_it_is_unpacked(client):
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    assert len(out.getvalue()) < 100_000
    refused(client, asked(QUESTION, data_uri(out.getvalue())), 413, "pixels")


def header(width, height):
    """Return a small PNG that says to be of another size."""
    data = bytearray(picture())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(100_000, 2_000), (10_000, 6_000)])
def test_the_limit_of_pixels_is_the_server_s_whoever_finds_out(client, width, height):
    """Pillow refuses the larger of the two by itself, and speaks of a limit of its own."""
    response = client.post(PATH, json=asked(QUESTION, data_uri(header(width, height))))
    assert response.status_code == 413, response.text
    message = response.json()["error"]["message"]
    assert f"{width * height} pixels, more than the limit of 50000000: shrink it" in message
    assert "max_pixels" not in message
    assert "bomb" not in message


def test_advice_is_for_who_reads_it(client):
    """No method, class or argument of Python is named to a client of HTTP."""
    answer = {"role": "assistant", "content": "red"}
    features = base64.b64encode(save({"f": torch.zeros(3, 7)})).decode()
    part = {"type": "image_embeds", "image_embeds": features}
    for body, cause in (
        ({"messages": [*asked("a")["messages"], answer]}, "add a message of the user"),
        ({"messages": [{"role": "user", "content": [part]}]}, "[n, 256]"),
        ({"messages": [{"role": "user", "content": "red " * 9_000}]}, "the prompt has 9"),
    ):
        response = client.post(PATH, json=body)
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert cause in message
        for word in ("open_turn", "Pillow", "generate()", "row 0", "EngineOptions"):
            assert word not in message


def test_more_pictures_than_one_request_may_have(serve):
    client = serve(limits=Limits(images=2))
    body = asked(QUESTION, *[data_uri(picture())] * 3)
    refused(client, body, 400, "3 pictures", "limit is 2")


def test_a_picture_as_text_by_mistake_is_too_long_and_says_so(client):
    body = {"messages": [{"role": "user", "content": data_uri(picture(size=400)) * 20}]}
    refused(client, body, 400, "49455 tokens", "shorten the text")


def test_a_prompt_is_counted_with_its_pictures_expanded(client):
    body = asked("word " * 1_000, *[data_uri(picture())] * 20)
    response = client.post(PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "visual" in response.json()["error"]["message"]
    good(client)


def test_without_a_limit_the_answer_is_whole(client):
    response = client.post(PATH, json=asked("What is in this picture?", data_uri(picture())))
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_pictures_of_other_sizes_at_the_same_time(client):
    colours = ("red", "green", "blue", "yellow")

    def ask(number):
        colour, size = colours[number % 4], 60 + 37 * number
        body = asked(QUESTION, data_uri(picture(colour, size)))
        return colour, client.post(PATH, json=body).json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as threads:
        assert all(colour == said for colour, said in threads.map(ask, range(16)))


def test_the_same_picture_in_every_turn_is_encoded_once(client):
    url = data_uri(picture("purple", 117))  # no other test's
    stats = client.app.state.service.chat.engine.features.stats
    before = stats.misses
    messages = []
    for _ in range(4):
        messages += asked(QUESTION, url)["messages"]
        response = client.post(PATH, json={"messages": messages})
        text = response.json()["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": text})
    assert stats.misses - before == 1


def test_twins_that_differ_in_one_pixel_are_two_pictures(client):
    one = Image.open(io.BytesIO(picture("red")))
    two = one.copy()
    two.putpixel((0, 0), (254, 255, 255))
    usages = []
    for image in (one, two, one):
        out = io.BytesIO()
        image.save(out, "PNG")
        response = client.post(PATH, json=asked("Is there a circle?", data_uri(out.getvalue())))
        usages.append(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert usages[1] < usages[2]  # the twin shares nothing behind its picture


def test_a_uuid_is_known_to_its_owner_alone(serve):
    client = serve(keys=(ApiKey(key="a", name="a"), ApiKey(key="b", name="b")))
    part = {"type": "image_url", "image_url": {"url": data_uri(picture("red"))}, "uuid": "mine"}
    text = {"type": "text", "text": QUESTION}
    first = {"messages": [{"role": "user", "content": [part, text]}]}
    again = {"type": "image_url", "image_url": None, "uuid": "mine"}
    second = {"messages": [{"role": "user", "content": [again, text]}]}
    a, b = {"x-api-key": "a"}, {"x-api-key": "b"}
    assert client.post(PATH, json=second, headers=a).status_code == 404
    assert client.post(PATH, json=first, headers=a).status_code == 200
    said = client.post(PATH, json=second, headers=a).json()
    assert said["choices"][0]["message"]["content"] == "red"
    response = client.post(PATH, json=second, headers=b)
    assert response.status_code == 404
    assert "send its image_url again" in response.json()["error"]["message"]


def test_a_file_is_uploaded_once_and_named_afterwards(client):
    files = {"file": ("red.png", picture("red"), "image/png")}
    file = client.post("/v1/files", files=files, data={"purpose": "vision"}).json()
    part = {"type": "input_image", "file_id": file["id"]}
    text = {"type": "text", "text": QUESTION}
    body = {"messages": [{"role": "user", "content": [part, text]}]}
    assert client.post(PATH, json=body).json()["choices"][0]["message"]["content"] == "red"
    assert client.get(f"/v1/files/{file['id']}/content").content == picture("red")
    assert file["id"] in [one["id"] for one in client.get("/v1/files").json()["data"]]
    assert client.delete(f"/v1/files/{file['id']}").json()["deleted"] is True
    refused(client, body, 404, "upload it again")
    bad = client.post("/v1/files", files={"file": ("a.png", b"nothing", "image/png")})
    assert bad.status_code == 400


@pytest.mark.parametrize("name", ["file", "purpose"])
def test_two_parts_of_one_name_are_refused(client, name):
    parts = [("file", ("red.png", picture("red"), "image/png")), ("purpose", (None, "vision"))]
    parts += [one for one in parts if one[0] == name]
    before = client.get("/v1/files").json()["data"]
    response = client.post("/v1/files", files=parts)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["message"][:20]) == (name, "2 parts are called " + name[0])
    assert client.get("/v1/files").json()["data"] == before


# Remote pictures


@contextmanager
def web(answer):
    """Serve on a free port of this machine; `answer(handler)` writes the response."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(data, *, claimed=None):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(claimed or len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def redirect(target):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    return answer


@pytest.fixture
def as_public(monkeypatch):
    """Take this machine's own address for one of the open internet."""
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")


def test_a_remote_picture_is_fetched_where_it_is_allowed(serve, as_public):
    client = serve(allow_remote_images=True)
    with web(send(picture("blue"))) as url:
        response = client.post(PATH, json=asked(QUESTION, f"{url}/a.png"))
        assert response.json()["choices"][0]["message"]["content"] == "blue"


def test_a_remote_picture_that_fails_is_400_and_never_an_empty_answer(serve, as_public):
    client = serve(allow_remote_images=True, limits=Limits(fetch_seconds=2.0, image_bytes=50_000))
    with web(send(picture(), claimed=9_999)) as url:
        refused(client, asked(QUESTION, url), 400, "connection ended")
    with web(send(bytes(60_000))) as url:
        refused(client, asked(QUESTION, url), 413, "limit")
    with web(lambda handler: handler.send_error(404)) as url:
        refused(client, asked(QUESTION, url), 400, "404")
    with web(lambda handler: time.sleep(4)) as url:
        refused(client, asked(QUESTION, url), 400, "within 2 s")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.png"
        refused(client, asked(QUESTION, url), 400, "cannot be fetched")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:80/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://2130706433/a.png",
        "http://0x7f000001/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/a.png",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://0.0.0.0/a.png",
    ],
)
def test_addresses_inside_are_not_fetched(serve, url):
    client = serve(allow_remote_images=True)
    response = client.post(PATH, json=asked(QUESTION, url))
    assert response.status_code == 400
    assert "no public address" in response.json()["error"]["message"]


def test_a_redirect_does_not_lead_inside(serve, as_public):
    client = serve(allow_remote_images=True)
    with web(redirect("http://10.1.2.3/secret")) as url:
        refused(client, asked(QUESTION, url), 400, "no public address")
    with web(redirect("file:///etc/passwd")) as url:
        refused(client, asked(QUESTION, url), 400, "only http and https")


def test_a_name_is_looked_up_once_and_that_address_is_used(serve, monkeypatch):
    """DNS rebinding: a second look-up would say something else."""
    answers = iter(["93.184.216.34"])
    asked_for = []

    def look_up(host, *args, **options):
        asked_for.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), 80))]

    connected = []

    def connect(address, *_):
        connected.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(download.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(download.socket, "create_connection", connect)
    with pytest.raises(ConnectionRefusedError):
        download.connect_in_public(("rebind.example", 80))
    assert asked_for == ["rebind.example"]
    assert connected == [("93.184.216.34", 80)]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


def test_files_only_below_the_media_root(serve, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret.png"
    root.mkdir()
    (root / "red.png").write_bytes(picture("red"))
    outside.write_bytes(picture("blue"))
    (root / "link.png").symlink_to(outside)
    client = serve(media_root=root)
    response = client.post(PATH, json=asked(QUESTION, f"file://{root}/red.png"))
    assert response.json()["choices"][0]["message"]["content"] == "red"
    for name in (f"{root}/link.png", f"{root}/../secret.png", str(outside), f"{root}/none.png"):
        response = client.post(PATH, json=asked(QUESTION, f"file://{name}"))
        assert response.status_code == 404
        assert "not below the media root" in response.json()["error"]["message"]


# Features


def embeds(data):
    part = {"type": "image_embeds", "image_embeds": base64.b64encode(data).decode()}
    content = [part, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}]}


def file_of(header, body=b""):
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + body


def test_features_of_a_picture_answer_as_the_picture_does(client, pebble):
    prepared = pebble.prepare(MediaPart(picture("red")))
    [features] = pebble.model.modality("image").embed([prepared])
    data = save({"features": features.detach().contiguous().clone()})
    response = client.post(PATH, json=embeds(data))
    assert response.json()["choices"][0]["message"]["content"] == "red"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        # 1.5 KB that claims 4 TiB.
        (
            file_of(
                {"x": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}},
                bytes(1400),
            ),
            "take 4398046511104 bytes",
        ),
        (file_of({"x": {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]}}), "[n, D]"),
        (file_of({"x": {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]}}), "dtype"),
        (file_of({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "[n, D]"),
        (file_of({}), "one matrix"),
        (file_of(b"[" * 4000), "one matrix"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no safetensors file"),
        (b"", "no safetensors file"),
        (save({"x": torch.full((64, 256), float("nan"))}), "NaN"),
        (save({"x": torch.zeros(64, 7)}), "[n, 256]"),
        (save({"x": torch.zeros(64, 256), "y": torch.zeros(1, 1)}), "one matrix"),
        (save({"x": torch.zeros(5000, 256)}), "context"),
    ],
)
def test_features_that_lie_are_refused(client, data, cause):
    refused(client, embeds(data), 400, cause)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_are_a_matrix_or_an_error(body, length):
    try:
        found = one_tensor(struct.pack("<Q", length) + body)
    except MediaError:
        return
    assert found.ndim == 2
