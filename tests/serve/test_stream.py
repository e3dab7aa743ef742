"""Streams that nobody reads, servers that are told to end, and answers of many clients."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import lapilli
from lapilli.config.generation import EngineOptions
from lapilli.errors import GenerationError
from tests.serve.conftest import asked, data_uri, picture, serving

PATH = "/v1/chat/completions"
PROGRAM = (sys.executable, "-c", "from lapilli.cli.main import main; main()")
LONG = {"max_tokens": 1500, "temperature": 2.0, "seed": 1, "logit_bias": {"2": -100}}
"""An answer that does not end by itself."""


def until(is_true, seconds=20.0):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_answer(client, stream):
    engine = client.app.state.service.chat.engine
    body = json.dumps({**asked("What is here?", data_uri(picture())), **LONG, "stream": stream})
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        until(lambda: engine.num_running)
    until(lambda: not engine.has_work)
    assert engine.pool.available == engine.pool.capacity


def test_an_answer_that_fails_in_the_middle_says_so_in_the_stream(client, monkeypatch):
    engine = client.app.state.service.chat.engine
    body = {**asked("What is here?", data_uri(picture())), **LONG, "stream": True}
    with client.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        engine.abort_all(GenerationError("the model failed: out of memory"))
        rest = [line[6:] for line in lines if line.startswith("data: ")]
    assert json.loads(rest[-1])["error"]["message"] == "the model failed: out of memory"


def test_more_requests_than_may_wait_are_told_to_come_later(pebble):
    chat = lapilli.load("pebble", engine=EngineOptions(max_rows=1, max_waiting=2))
    body = {**asked("What is here?", data_uri(picture())), **LONG, "max_tokens": 300}
    with serving(chat) as client, ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: client.post(PATH, json=body), range(6)))
    codes = sorted(one.status_code for one in found)
    assert codes[0] == 200
    assert codes[-1] == 429
    assert set(codes) == {200, 429}
    late = next(one for one in found if one.status_code == 429)
    assert late.headers["Retry-After"] == "1"
    assert "limit" in late.json()["error"]["message"]


def test_metrics_are_read_by_the_parser_of_prometheus(client):
    client.post(PATH, json=asked("What color is the circle?", data_uri(picture())))
    text = client.get("/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (
        "time_to_first_token_seconds",
        "num_requests_running",
        "mm_cache_hits",
        "prefix_cache_queries",
        "generation_tokens",
        "request_success",
    ):
        assert f"lapilli:{name}" in found, name
    [sample] = found["lapilli:generation_tokens"].samples[:1]
    assert sample.value > 0
    assert sample.labels["model_name"] == "pebble"


@contextmanager
def program(*options):
    """Run `lapilli serve` as a process of its own; yield it and its address once it is ready."""
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for line in process.stderr:
            ready = re.search(r"ready on (http://\S+)", line)
            if ready:
                break
        else:
            pytest.fail(f"the server ended with {process.wait()}")
        yield process, ready[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_finishes_what_runs_and_takes_nothing_new():
    with program() as (process, address), ThreadPoolExecutor(1) as threads:
        body = {**asked("What is here?", data_uri(picture())), **LONG, "max_tokens": 400}
        answer = threads.submit(httpx.post, f"{address}{PATH}", json=body, timeout=60)
        metrics = f"{address}/metrics"
        until(lambda: 'num_requests_running{model_name="pebble"} 1.0' in httpx.get(metrics).text)
        process.send_signal(signal.SIGTERM)
        found = answer.result(60)
        assert found.status_code == 200
        assert found.json()["usage"]["completion_tokens"] == 400
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


def test_a_port_that_is_taken_is_said_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            [*PROGRAM, "serve", "--port", str(taken.getsockname()[1]), "-q"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "cannot be listened on" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_many_clients_each_get_the_answer_to_their_own_picture(client):
    colours = ("red", "green", "blue", "yellow")

    def ask(number):
        colour = colours[number % 4]
        body = asked("What color is the circle?", data_uri(picture(colour, 90 + number)))
        with client.stream("POST", PATH, json={**body, "stream": True}) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
        said = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
        return colour, "".join(said)

    with ThreadPoolExecutor(16) as threads:
        wrong = [one for one in threads.map(ask, range(48)) if one[0] != one[1].strip()]
    assert wrong == []
