"""`lapilli bench` on pebble."""

import json

import pytest

from lapilli.cli.bench import describe
from tests.cli.conftest import Run

pytestmark = pytest.mark.slow


def test_figures_as_json_and_as_text(lapilli: Run) -> None:
    done = lapilli(
        "bench", "--json", "--threads", "1", "--new-tokens", "8", "--repeats", "1", "--many", "2"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["threads"] == 1
    assert 0 < found["second_s"] < found["first_s"]
    assert found["tokens_per_s"] > 1
    assert found["bytes_per_s"] > 1e8
    assert found["positions"] > 40
    threads = found.pop("threads")
    lines = describe(found, 2).splitlines()
    assert threads == 1
    assert [line.split("  ")[0] for line in lines] == [
        "load",
        "look at a picture",
        f"first token, {found['positions']:.0f} positions",
        "second question, same picture",
        "decoding",
        *(["2 at once"] if "many_tokens_per_s" in found else []),
        "peak memory",
        "this machine",
    ]


def test_a_wrong_name_is_one_line(lapilli: Run) -> None:
    done = lapilli("bench", "pebble", "--quantize", "int3")
    assert done.returncode == 2
    assert "int3" in done.stderr
    assert done.stderr.count("\n") == 1
