"""The table of what quantization costs: every row once, and the page that says what was found."""

import json
from pathlib import Path

import pytest

from benchmarks import quantization_report as report
from benchmarks.machine import RESULTS
from benchmarks.quantization import (
    ROWS,
    Row,
    Seeing,
    Table,
    drawn_samples,
    key_of,
    make,
    measure,
    speeds,
)
from lapilli.quant import QuantConfig


def test_every_row_has_a_name_of_its_own() -> None:
    keys = [key_of(row) for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert {"float32", "int8", "W4A8 nonlinear, mbq", "W3A16 zeros g32, awq"} <= set(keys)
    assert {row.method for row in ROWS if row.samples} == {"gptq", "awq", "awq-clip", "mbq"}


@pytest.mark.slow
def test_rows_of_pebble_are_measured_and_kept(tmp_path: Path, monkeypatch) -> None:
    rows = [
        Row("float32", None),
        Row("nearest", QuantConfig(), "rtn"),
        Row("gptq", QuantConfig(levels="zeros", group_size=32), "gptq", 3, samples="text"),
    ]
    monkeypatch.setattr("benchmarks.quantization.ROWS", rows)
    monkeypatch.setattr("benchmarks.quantization.SAMPLES", {"pebble": 4})
    table = Table(tmp_path / "found.json")
    exam = Seeing("pebble", 24)
    samples = drawn_samples(tmp_path)
    measure("pebble", exam, samples, table)
    found = json.loads(table.path.read_text())["models"]["pebble"]
    assert list(found) == [key_of(row) for row in rows]
    assert found["float32"]["skills"]["all"] > 0.8
    nearest, gptq = (found[key_of(row)] for row in rows[1:])
    assert 0 < nearest["kl"] < 0.1
    assert 4 < nearest["bits"] < 5.5
    assert gptq["config"]["group_size"] == 32
    monkeypatch.setattr("benchmarks.quantization.make", lambda *_: pytest.fail("made again"))
    measure("pebble", exam, samples, table)


def test_samples_of_text_have_no_pictures(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.quantization.SAMPLES", {"pebble": 3})
    files = drawn_samples(tmp_path)
    records = json.loads(Path(files["text"]).read_text())
    assert len(records) == 3
    assert "image" not in json.dumps(records)
    assert "<image>" in Path(files["pictures"]).read_text()


def test_float_and_int8_are_not_made_from_samples(tmp_path: Path) -> None:
    chat, _ = make("pebble", Row("int8", QuantConfig(bits=8)), "", 0, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "QuantLinear" in str(chat.model.language_model)


@pytest.mark.slow
def test_speeds_are_those_of_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROUNDS", 1), ("DECODED", 4), ("PROMPT", 64)):
        monkeypatch.setattr(f"benchmarks.quantization.{name}", value)
    few = {"float32": None, "W4A8 nonlinear": QuantConfig()}
    monkeypatch.setattr("benchmarks.quantization.SPEEDS", few)
    found = speeds("pebble")
    assert list(found) == list(few)
    assert found["float32"]["MB"] > 4 * found["W4A8 nonlinear"]["MB"]
    assert all(row["prompt"] > 0 and row["decode"] > 0 for row in found.values())
    assert "| W4A8 nonlinear | " in report.page({"models": {}, "speeds": found})


def test_the_page_and_the_plot_say_what_was_found(tmp_path: Path) -> None:
    found = json.loads((RESULTS / "quantization.json").read_text("utf-8"))
    assert report.page(found) == report.PAGE.read_text("utf-8")
    report.draw(found, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 5000
