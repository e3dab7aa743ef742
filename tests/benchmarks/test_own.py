"""`python -m benchmarks.own`: the figures of a checkpoint of yours."""

import json

import pytest

from benchmarks import own
from benchmarks.own import describe, main

FIGURES = {
    "load_s": 1.25, "tower_s": 0.2, "tower_operations": 2e10, "first_s": 0.7, "positions": 616.0,
    "prompt_operations": 1e11, "second_s": 0.07, "second_over_first": 0.1, "tokens_per_s": 20.0,
    "weight_bytes": 5e8, "bytes_per_s": 2e10, "many_tokens_per_s": 55.5, "peak_bytes": 3e9,
    "float32_per_s": 1e11, "bfloat16_per_s": 2e11, "int8_per_s": 4e11,
}  # fmt: skip


def test_every_figure_is_told() -> None:
    assert describe(FIGURES, 2).splitlines() == [
        "load                           1.25 s",
        "look at a picture              200 ms, 100 GFLOP/s",
        "first token, 616 positions     0.70 s, 200 GFLOP/s beside the tower",
        "second question, same picture  0.070 s, 10 % of the first",
        "decoding                       20.0 tokens/s, 10.0 GB/s of weights, 50 % of what the "
        "machine reads",
        "2 at once                      55.5 tokens/s",
        "peak memory                    3.00 GB",
        "this machine                   20.0 GB/s; GFLOP/s: 100 float32, 200 bfloat16, 400 int8",
    ]


@pytest.mark.parametrize("name", ["many_tokens_per_s", "peak_bytes"])
def test_what_was_not_measured_is_left_out(name: str) -> None:
    lines = describe({key: FIGURES[key] for key in FIGURES if key != name}, 2).splitlines()
    assert len(lines) == 7


@pytest.mark.slow
def test_pebble_is_measured(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(own, "measure_limits", lambda: {"bytes_per_s": 1e10})
    main(["--json", "--threads", "1", "--new-tokens", "8", "--repeats", "1", "--many", "2"])
    found = json.loads(capsys.readouterr().out)
    expected = {name for name in FIGURES if not name.endswith("_per_s")} | {"tokens_per_s"}
    assert expected <= found.keys()
    assert found["many_whole_tokens_per_s"] > 0
    assert (found["threads"], found["positions"]) == (1, 64 + 40)


def test_an_error_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pebble", "--quantize", "int3"])
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert "int3" in told
    assert told.count("\n") == 1
