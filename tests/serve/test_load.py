"""64 clients at once, each with pictures of its own: no error, no wrong answer, no leak."""

import os

import pytest

from benchmarks.serve import under_load

SECONDS = float(os.environ.get("LAPILLI_LOAD_SECONDS", "8"))
CLIENTS = 64


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 10 + 300)
def test_every_client_reads_the_answer_about_its_own_picture():
    found = under_load("pebble", CLIENTS, SECONDS)
    assert found["errors"] == 0, found["first_errors"]
    assert found["wrong"] == 0
    assert found["requests"] >= CLIENTS
    if SECONDS >= 60:  # until then blocks are used for the first time
        assert found["grown_mib"] < 32
