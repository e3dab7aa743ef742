"""Ray Serve: one picture, one replica; a replica killed, and all of them restarted under load."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import psutil
import pytest

from lapilli.cli.serve import Loader
from lapilli.cli.terminal import ChatOptions
from lapilli.cluster import Share
from lapilli.serve.address import bind, listen
from lapilli.serve.distributed import deploy
from lapilli.serve.front import REPLICA_HEADER, Front, front_app
from lapilli.serve.options import ApiKey, ServeOptions
from lapilli.serve.run import Server
from tests.serve.conftest import KEY, asked, data_uri, picture

# Ray warns about settings of its own that nobody has set.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
OPTIONS = ServeOptions(port=0, keys=(ApiKey(key=KEY, name="a"),))
COLOURS = ("red", "blue", "green", "yellow", "black", "orange", "purple", "pink")
FEW = {"max_tokens": 8, "temperature": 0}


class Cluster:
    """Two replicas behind a front that listens."""

    def __init__(self) -> None:
        front = Front(self.deploy(), OPTIONS)
        self._listening = bind(OPTIONS)
        listen(self._listening, OPTIONS)
        ready = threading.Event()
        self._server = Server(front_app(front, OPTIONS), ready.set)
        run = {"sockets": [self._listening]}
        self._thread = threading.Thread(target=self._server.run, kwargs=run, daemon=True)
        self._thread.start()
        assert ready.wait(60)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=self.url, timeout=120, headers=headers)

    def deploy(self) -> object:
        how = ChatOptions(sampling={}, device="cpu", dtype="float32")
        loader = Loader(how, (), {"max_rows": 4})
        behind = ServeOptions(port=0, without_key=True)
        return deploy(loader, behind, replicas=2, share=Share(cpus=1), rows=4)

    def ask(self, url: str, question: str = "What is shown?", **options: object) -> httpx.Response:
        body = asked(question, url, **FEW, **options)
        return self.client.post("/v1/chat/completions", json=body)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(60)
        self._listening.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        object_store_memory=200 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=False,
    )
    made = Cluster()
    yield made
    made.close()
    serve.shutdown()
    ray.shutdown()


class Load:
    """Asks about pictures from a thread, until it is left; keeps the status of every answer."""

    def __init__(self, cluster: Cluster) -> None:
        self.found: list[int] = []
        self._cluster = cluster
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self._is_over.is_set():
            number += 1
            url = data_uri(picture(COLOURS[number % len(COLOURS)]))
            try:
                self.found.append(self._cluster.ask(url, f"What? {number}").status_code)
            except httpx.HTTPError:
                self.found.append(0)

    def __enter__(self) -> "Load":
        self._thread.start()
        until(lambda: len(self.found) > 2)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(120)


def until(condition: Callable[[], object]) -> None:
    """Wait until it holds, without taking much of the processors that others need."""
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def replica_processes() -> list[psutil.Process]:
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "ServeReplica:lapilli:engine" in " ".join(one.cmdline()):
                found.append(one)
    return found


def test_requests_about_a_picture_go_where_its_cache_is(cluster):
    first = {}
    for colour in COLOURS:
        answer = cluster.ask(data_uri(picture(colour)))
        assert answer.status_code == 200, answer.text
        first[colour] = answer.headers[REPLICA_HEADER]
    assert len(set(first.values())) == 2
    for colour in COLOURS:
        again = cluster.ask(data_uri(picture(colour)), "Is there a circle?")
        assert again.headers[REPLICA_HEADER] == first[colour]
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_stream_and_the_answer_of_one_process(cluster, client):
    url = data_uri(picture("red"))
    body = asked("What is shown?", url, **FEW)
    alone = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert cluster.ask(url).json()["choices"] == alone
    with cluster.client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True}
    ) as stream:
        assert stream.status_code == 200
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_a_file_is_seen_by_every_replica(cluster):
    data = picture("red")
    sent = cluster.client.post("/v1/files", files={"file": ("a.png", data, "image/png")})
    assert sent.status_code == 200, sent.text
    name = sent.json()["id"]
    by_data, by_name = cluster.ask(data_uri(data)), cluster.ask(name)
    assert by_name.status_code == 200, by_name.text
    assert by_name.headers[REPLICA_HEADER] == by_data.headers[REPLICA_HEADER]
    assert cluster.client.get(f"/v1/files/{name}/content").content == data
    assert cluster.client.delete(f"/v1/files/{name}").json()["deleted"]
    assert cluster.ask(name).status_code == 404
    wrong = cluster.client.post("/v1/files", files={"file": ("a.png", b"no", "image/png")})
    assert wrong.status_code == 400


def test_the_gate_stands_in_front(cluster):
    url = data_uri(picture("red"))
    body = asked("What?", url, **FEW)
    stranger = httpx.post(f"{cluster.url}/v1/chat/completions", json=body)
    assert stranger.status_code == 401
    assert httpx.get(f"{cluster.url}/health").json() == {"status": "ok"}
    assert cluster.client.get("/v1/models").json()["data"][0]["id"] == "pebble"
    wrong = cluster.client.post("/v1/chat/completions", json={"messages": 3})
    assert wrong.status_code == 400
    assert cluster.client.get("/nothing").status_code == 404


def test_metrics_of_all_replicas(cluster):
    for colour in COLOURS:
        cluster.ask(data_uri(picture(colour)))
    text = cluster.client.get("/metrics").text
    names = {line.partition("replica=")[2][:10] for line in text.splitlines() if "mm_cache" in line}
    assert len(names) == 2


def test_a_replica_that_is_killed_costs_no_request(cluster):
    with Load(cluster) as load:
        victim = replica_processes()[0]
        victim.send_signal(signal.SIGKILL)
        before = len(load.found)
        until(lambda: len(load.found) > before + 10)
        until(lambda: len(replica_processes()) == 2)
    assert set(load.found) == {200}


def test_a_rolling_restart_under_load_costs_no_request(cluster):
    before = {one.pid for one in replica_processes()}
    with Load(cluster) as load:
        cluster.deploy()
        until(lambda: not before & {one.pid for one in replica_processes()})
    assert set(load.found) == {200}
    assert len(replica_processes()) == 2
    assert cluster.ask(data_uri(picture("red"))).status_code == 200


def test_the_command_restarts_its_replicas_and_ends():
    pytest.importorskip("ray.serve")
    program = (sys.executable, "-c", "from lapilli.cli.main import main; main()")
    options = ("--port", "0", "--engine", "ray", "--replicas", "1", "--device", "cpu")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [*program, "serve", "pebble", *options]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        url = next(
            line.split()[-1] for line in process.stderr if line.startswith("lapilli: ready on")
        )
        body = asked("What is shown?", data_uri(picture("red")), **FEW)

        def ask() -> str:
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            return answer.headers[REPLICA_HEADER]

        first = ask()
        process.send_signal(signal.SIGHUP)
        until(lambda: ask() != first)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == 0  # as without Ray
    finally:
        process.kill()
        process.communicate()
