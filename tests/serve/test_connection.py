"""Requests that do not end as they should: bodies that never come, clients that ask for heads."""

import asyncio
import errno
import logging
import socket
import time
from contextlib import suppress
from itertools import pairwise

import pytest
from starlette.datastructures import UploadFile

from lapilli.errors import ConfigError
from lapilli.serve.connection import LARGE, Connections, OpenRequests
from lapilli.serve.options import Limits
from tests.serve.conftest import picture

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
)


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


def rest(raw: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    found = b""
    with suppress(ConnectionResetError):  # where more was sent than the server has read
        while piece := raw.recv(4096):
            found += piece
    return found


def test_a_body_that_stops_is_408_and_the_connection_is_closed(serve):
    client = serve(limits=Limits(idle_seconds=0.3))
    with connect(client) as raw:
        raw.sendall(HEAD + b'{"messages"')
        found = rest(raw)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"no byte of its body came for 0.3 seconds" in found


def test_a_body_that_drips_is_408(serve):
    client = serve(limits=Limits(body_seconds=0.5))
    with connect(client) as raw:
        raw.sendall(HEAD)
        raw.settimeout(0.05)
        found = b""
        for _ in range(600):
            try:
                found = raw.recv(4096)
                break
            except TimeoutError:
                raw.sendall(b" ")
        raw.settimeout(30)
        found += rest(raw)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"its body took more than 0.5 seconds" in found


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"])
def test_a_connection_without_a_request_is_closed(serve, said):
    client = serve(limits=Limits(idle_seconds=0.3))
    with connect(client) as raw:
        raw.sendall(said)
        assert rest(raw) == b""


def test_a_connection_that_is_used_stays(serve):
    client = serve(limits=Limits(idle_seconds=1.2))
    with connect(client) as raw:
        for _ in range(8):
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.4)


@pytest.mark.parametrize("name", ["idle_seconds", "body_seconds", "fetch_seconds"])
def test_a_deadline_is_above_0(name):
    with pytest.raises(ConfigError, match=f"{name} must be above 0"):
        Limits(**{name: 0.0})


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/pebble"]
)
def test_a_head_is_that_of_the_get_without_a_body(client, path):
    whole, head = client.get(path), client.head(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    for name in ("content-type", "etag"):
        assert head.headers.get(name) == whole.headers.get(name)
    assert "content-length" in head.headers
    assert client.get("/health").json() == {"status": "ok"}  # the connection goes on


def test_a_head_of_what_is_not_there_says_so(client):
    assert client.head("/nothing").status_code == 404
    assert client.head("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(
    ("number", "cause"),
    [(errno.ENOSPC, "its disk is full"), (errno.EROFS, "it can write no temporary file")],
)
def test_a_disk_that_takes_no_upload_is_507_with_the_cause(
    client, monkeypatch, caplog, number, cause
):
    async def full(self, data):
        raise OSError(number, "no place")

    monkeypatch.setattr(UploadFile, "write", full)
    with caplog.at_level(logging.ERROR, "lapilli.serve"):
        response = client.post("/v1/files", files={"file": ("a.png", picture(), "image/png")})
    assert response.status_code == 507
    assert cause in response.json()["error"]["message"]
    [line] = [one for one in caplog.records if one.name.startswith("lapilli.serve")]
    assert cause in line.getMessage()
    assert line.exc_info is None


@pytest.mark.parametrize("size", [LARGE, 10])
def test_the_event_loop_goes_on_between_large_bodies(size):
    """They come at the same time: of small ones several are handed over before anything else."""
    log = []

    async def app(_scope, receive, _send):
        log.append(len((await receive())["body"]))

    async def send(_message):
        pass

    async def request(requests):
        parts = [{"type": "http.request", "body": b"x" * size, "more_body": False}]
        gone = asyncio.Event()

        async def receive():
            if not parts:
                await gone.wait()
            return parts.pop()

        scope = {"type": "http", "method": "POST", "headers": [(b"content-length", b"9")]}
        await Connections(app, requests, Limits())(scope, receive, send)

    async def run():
        requests = OpenRequests()
        asked = [asyncio.create_task(request(requests)) for _ in range(5)]
        while not all(one.done() for one in asked):
            log.append("else")
            await asyncio.sleep(0)

    asyncio.run(run())
    bodies = [one for one in log if one != "else"]
    assert bodies == [size] * 5
    together = any("else" not in pair for pair in pairwise(log))
    assert together is (size < LARGE)
