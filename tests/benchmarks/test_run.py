"""The benchmark end to end in its tiny shape, and what a cut-off run keeps."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    run.main(arguments(folder))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("--shape", "tiny", "--engines", "lapilli int4,transformers float32", "--rounds", "1"),
        *("--repeats", "1", "--many", "2", "--new-tokens", "8", "--threads", "1", "--no-growth"),
        *("--folder", str(folder), "--out", str(folder / "results"), *more),
    ]


@pytest.mark.slow
def test_a_tiny_run_writes_its_report(out: Path) -> None:
    found = json.loads((out / "results" / "inference-tiny.json").read_text())
    assert not found["failed"]
    rows = found["summary"]["engines"]
    assert {"lapilli int4", "transformers float32"} <= set(rows)
    for row in rows.values():
        assert row["first_s"] > 0
        assert row["tokens_per_s"] > 0
        assert row["peak_bytes"] > 1e6
    assert rows["lapilli int4"]["second_over_first"] < 1
    assert found["skipped"]["llama.cpp Q4_0"]
    page = (out / "results" / "inference-tiny.md").read_text()
    assert "| lapilli int4 |" in page
    assert "- not measured: llama.cpp Q4_0:" in page
    assert (out / "results" / "inference-tiny.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_what_was_made_is_removed(out: Path) -> None:
    assert not (out / "lapilli-bench-models-tiny").exists()


@pytest.mark.slow
def test_resuming_runs_nothing_twice(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(python: str, arguments: list[str]) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(run, "run_child", never)
    before = json.loads((out / "results" / "raw" / "inference-tiny.json").read_text())["done"]
    run.main(arguments(out, "--resume"))
    after = json.loads((out / "results" / "raw" / "inference-tiny.json").read_text())["done"]
    assert after == before


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    first = run.Notes(path, {"threads": 1}, resume=False)
    first.write()
    with pytest.raises(SystemExit, match="other settings"):
        run.Notes(path, {"threads": 2}, resume=True)


def test_a_failed_process_is_named_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(python: str, arguments: list[str]) -> None:
        raise run.ChildError("out of memory")

    notes = run.Notes(tmp_path / "raw.json", {}, resume=False)
    monkeypatch.setattr(run, "run_child", fails)
    notes.run("figures/x/0", "python", [])
    assert json.loads((tmp_path / "raw.json").read_text())["failed"]["figures/x/0"]
    monkeypatch.setattr(run, "run_child", lambda python, arguments: {"first_s": 1.0})
    again = run.Notes(tmp_path / "raw.json", {}, resume=True)
    again.run("figures/x/0", "python", [])
    assert again.found["done"] == {"figures/x/0": {"first_s": 1.0}}
    assert not again.found["failed"]


@pytest.mark.parametrize(("code", "failed"), [(0, False), (3, True)])
def test_quality_is_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, failed: bool
) -> None:
    asked: list[list[str]] = []

    def start(command: list[str], **options: object) -> subprocess.CompletedProcess:
        asked.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(run.subprocess, "run", start)
    notes = run.Notes(tmp_path / "raw.json", {}, resume=False)
    ik = ["--ik", str(tmp_path), "--resume"]
    run.run_quality(notes, run.parse([*ik, "--threads", "1", "--out", str(tmp_path)]))
    [command] = asked
    assert command[1:3] == ["-m", "benchmarks.quality"]
    assert {*ik, "--out", "--peers-python"} <= set(command)
    assert ("quality" in notes.found["failed"]) is failed


def test_every_report_takes_what_is_known_of_quality(tmp_path: Path) -> None:
    notes = run.Notes(tmp_path / "raw.json", {}, resume=False)
    run.read_quality(notes, tmp_path)
    assert "quality" not in notes.found
    (tmp_path / "quality.json").write_text('{"formats": {}}')
    run.read_quality(notes, tmp_path)
    assert notes.found["quality"] == {"formats": {}}
