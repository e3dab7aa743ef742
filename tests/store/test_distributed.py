"""Ray: the same entries as one process makes, with a worker killed, and the process that writes."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import torch

import lapilli
from lapilli.errors import ConfigError, PromptError, StoreError
from lapilli.store import Store
from lapilli.store.distributed import build_store_distributed
from lapilli.store.encode import TextEncoder, build_store
from tests.train.faults import wait_for

# Ray warns about settings of its own that nobody has set.
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore:::ray")]
ITEMS = [(f"i{n}", f"item {n} is a red square with {n % 7} blue circles in it") for n in range(600)]


def encoder(seed: int = 0) -> TextEncoder:
    """pebble; another seed has other weights."""
    chat = lapilli.load("pebble", device="cpu", dtype="float32")
    if seed:
        chat.model.language_model.get_parameter("model.norm.weight").data += seed
    return TextEncoder(chat.model, chat.tokenizer, tokens=2)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "s"
    build_store(path, ITEMS, encoder(), dtype="float32")
    return Store(path)


def same(found: Store, expected: Store) -> None:
    ids = [one for one, _ in ITEMS]
    assert len(found) == len(ids)
    torch.testing.assert_close(found.get(ids), expected.get(ids), rtol=1e-4, atol=1e-4)


def workers() -> list[psutil.Process]:
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "MapWorker" in " ".join(one.cmdline()):
                found.append(one)
    return found


def test_a_worker_that_is_killed_costs_nothing(ray, plain, tmp_path):
    killed = []

    def kill_one() -> bool:
        for victim in workers():
            with suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)
                killed.append(victim.pid)
                return True
        return False

    killer = threading.Thread(target=wait_for, args=(kill_one,))
    killer.start()
    changed = build_store_distributed(
        tmp_path / "s", ITEMS, encoder(), encoder, workers=2, dtype="float32"
    )
    killer.join()
    assert killed
    assert changed == len(ITEMS)
    same(Store(tmp_path / "s"), plain)


def test_only_what_changed_is_encoded(ray, plain, tmp_path):
    made, done = encoder(), []
    path = tmp_path / "s"
    build_store(path, ITEMS[:590], made, dtype="float32")
    call = {"workers": 1, "progress": done.append}
    assert build_store_distributed(path, ITEMS, made, encoder, **call) == 10
    assert done == [600]
    assert build_store_distributed(path, ITEMS, made, encoder, **call) == 0
    assert done == [600, 600]
    same(Store(path), plain)


def test_what_is_wrong_is_said(ray, tmp_path):
    made = encoder()
    with pytest.raises(PromptError, match=r"^item 'a' .* has \d+ tokens, and the model reads"):
        build_store_distributed(tmp_path / "a", [("a", "word " * 3000)], made, encoder, workers=1)
    with pytest.raises(StoreError, match="a worker of Ray has another encoder: expected sha256:"):
        build_store_distributed(tmp_path / "b", ITEMS[:2], encoder(1), encoder, workers=1)
    with pytest.raises(ConfigError, match="3 workers need 3 CPUs, and Ray has 2: ask for fewer"):
        build_store_distributed(tmp_path / "c", ITEMS, made, encoder, workers=3)
    with pytest.raises(ConfigError, match="workers is 0: expected 1 or more"):
        build_store_distributed(tmp_path / "c", ITEMS, made, encoder, workers=0)


def test_a_ray_that_does_not_start(monkeypatch, tmp_path):
    ray = pytest.importorskip("ray")

    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nLook at it")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ConfigError, match="Ray does not start on this machine: The current node"):
        build_store_distributed(tmp_path / "s", ITEMS, encoder(), encoder, workers=2)


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"need Ray: .*, or ask for one worker"):
        build_store_distributed(tmp_path / "s", ITEMS, encoder(), encoder, workers=2)


def test_a_killed_command_goes_on(tmp_path, plain):
    pytest.importorskip("ray")
    items = tmp_path / "items.jsonl"
    lines = [json.dumps({"id": one, "text": text}) for one, text in ITEMS]
    items.write_text("\n".join(lines))
    program = "from lapilli.cli.main import main; main()"
    command = [sys.executable, "-c", program, "store", "build", str(items)]
    command += [str(tmp_path / "s"), "--encoder", "pebble", "--tokens", "2", "--workers", "1"]
    command += ["--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    time.sleep(3)
    first.kill()
    first.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"of {len(ITEMS)} items encoded, the others were there" in done.stderr
    found = Store(tmp_path / "s")
    found.verify()
    assert len(found) == len(ITEMS)
