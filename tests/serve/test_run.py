"""The end of a server: what runs is answered or told, and no thread or client holds the process."""

import json
import signal
import socket
import subprocess
import sys
from base64 import b64encode

import httpx
import pytest

from lapilli.serve import run
from lapilli.serve.run import ServerThread
from tests.serve.conftest import asked, data_uri, picture
from tests.serve.test_connection import rest
from tests.serve.test_stream import LONG, program, until

PATH = "/v1/chat/completions"
LESS_THAN_DRAIN = 20
"""Seconds that are enough for an end without waiting, and not for one that waits for clients."""


def port_of(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").partition(":")
    return host, int(port)


def test_half_a_request_does_not_hold_a_server_that_stops():
    with program() as (process, address), socket.create_connection(port_of(address)) as raw:
        raw.settimeout(30)
        raw.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: 1000\r\n\r\n{".encode()
        )
        httpx.get(f"{address}/health")  # by now the half is there
        process.send_signal(signal.SIGTERM)
        found = rest(raw)
        assert found.startswith(b"HTTP/1.1 503 ")
        assert b"the server is stopping" in found
        assert process.wait(LESS_THAN_DRAIN) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("path", "ends"),
    [
        (PATH, 'data: {"error":'),
        ("/v1/messages", "event: error"),
        ("/api/chat", '{"error": '),
    ],
)
def test_a_second_signal_ends_streams_with_an_error_and_no_traceback(path, ends):
    shown = b64encode(picture()).decode()
    body = {**asked("What is here?", data_uri(picture())), **LONG, "stream": True}
    if path == "/v1/messages":
        source = {"type": "base64", "media_type": "image/png", "data": shown}
        turn = {"role": "user", "content": [{"type": "image", "source": source}]}
        body = {"messages": [turn], "max_tokens": 1500, "stream": True, "temperature": 1.0}
    if path == "/api/chat":
        turn = {"role": "user", "content": "What is here?", "images": [shown]}
        options = {"num_predict": 1500, "temperature": 2.0}
        body = {"model": "pebble", "messages": [turn], "options": options}
    # No token ends an answer, in protocols without that option too.
    with program("--logit-bias", "2=-100") as (process, address):
        with httpx.stream("POST", f"{address}{path}", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            told = [line for line in lines if line]
        assert process.wait(LESS_THAN_DRAIN) == 0
        assert any(line.startswith(ends) for line in told[-2:]), told[-2:]
        assert "the server is stopping" in told[-1]
        assert process.stderr.read() == ""


def test_what_takes_longer_than_the_drain_is_told_so(pebble, monkeypatch):
    monkeypatch.setattr(run, "DRAIN_SECONDS", 0.3)
    server = ServerThread(pebble)
    body = {**asked("What is here?", data_uri(picture())), **LONG, "stream": True}
    with httpx.stream("POST", f"{server.url}{PATH}", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.close()
        told = [line[6:] for line in lines if line.startswith("data: ")]
    assert json.loads(told[-1])["error"]["message"].startswith("the server is stopping")
    assert not pebble.engine.has_work


def test_a_client_that_does_not_read_does_not_hold_the_end(pebble, monkeypatch, caplog):
    monkeypatch.setattr(run, "DRAIN_SECONDS", 0.3)
    server = ServerThread(pebble)
    body = {**asked("What is here?", data_uri(picture())), **LONG, "stream": True, "n": 16}
    said = json.dumps(body)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(port_of(server.url))
        raw.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(said)}\r\n\r\n{said}".encode()
        )
        until(lambda: pebble.engine.num_running)
        server.close()
    assert "Traceback" not in caplog.text
    until(lambda: not pebble.engine.has_work)


def test_a_thread_that_nobody_waits_for_does_not_hold_the_process():
    code = """
import threading, time
from lapilli.serve import run
run.LAST_SECONDS = 0.1
run.end_process()
print("goes on without one")
threading.Thread(target=time.sleep, args=(600,), name="lapilli-reader-0", daemon=True).start()
run.end_process()
print("and with one")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on without one\n", "")
