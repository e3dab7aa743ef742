"""`lapilli batch`: a line for every line, errors among them, and killed in the middle."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lapilli.cli.batch import Line, answered, parse, read_lines
from lapilli.errors import PromptError
from tests.cli.conftest import PROGRAM

FEW = ("--max-new-tokens", "5", "--device", "cpu", "--dtype", "float32")


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def results(path: Path) -> dict[int, dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len({row["line"] for row in rows}) == len(rows)
    return {row["line"]: row for row in rows}


def test_every_line_has_a_result(lapilli, checkpoint, picture, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"question": "What is shown?", "image": picture, "id": "a"},
        {"question": "Who are you?", "id": 2},
        {"question": "What?", "images": ["missing.png"], "id": 3},
        {"question": "  "},
        {"question": "What?", "images": [7]},
        [1],
    ]
    write(source, rows)
    with source.open("a", encoding="utf-8") as file:
        file.write("no JSON\n\n")
    done = lapilli("batch", str(source), str(target), "--model", checkpoint, *FEW)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "5 of 7 lines have an error" in done.stderr
    found = results(target)
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    assert found[1]["id"] == "a"
    assert found[1]["new_tokens"] == 5
    assert found[1]["finish_reason"] == "length"
    assert str(tmp_path / "missing.png") in found[3]["error"]
    assert found[3]["id"] == 3
    assert 'no "question"' in found[4]["error"]
    assert "must be a list of paths" in found[5]["error"]
    assert "not a JSON object" in found[6]["error"]
    assert "not JSON" in found[7]["error"]

    asked = lapilli("ask", "What is shown?", picture, "--model", checkpoint, "-q", *FEW)
    assert asked.stdout.strip() == found[1]["answer"]
    before = target.read_bytes()
    again = lapilli("batch", str(source), str(target), "--model", checkpoint, *FEW)
    assert "7 of 7 lines are in" in again.stderr
    assert target.read_bytes() == before


def test_killed_in_the_middle_it_goes_on(lapilli, checkpoint, tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        [{"question": f"What is number {i}?"} for i in range(300)],
    )
    target = tmp_path / "out.jsonl"
    command = [str(PROGRAM), "batch", str(source), str(target), "--model", checkpoint]
    options = [*FEW, "--rows", "2", "--quiet"]
    process = subprocess.Popen([*command, *options], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 200
    while not target.exists() or target.stat().st_size < 500:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = results_of_whole_lines(target)
    assert 0 < len(first) < 300
    with target.open("ab") as file:
        file.write(b'{"line": 299, "ans')  # what a torn write leaves
    done = lapilli("batch", str(source), str(target), "--model", checkpoint, *FEW)
    assert done.returncode == 0, done.stderr
    assert f"{len(first)} of 300 lines are in" in done.stderr
    found = results(target)
    assert sorted(found) == list(range(1, 301))
    assert all("answer" in row for row in found.values())
    assert {number: found[number] for number in first} == first


def results_of_whole_lines(path: Path) -> dict[int, dict[str, object]]:
    whole = path.read_bytes().rpartition(b"\n")[0]
    return {row["line"]: row for row in map(json.loads, whole.splitlines())}


def test_torn_line_is_dropped(tmp_path):
    target = tmp_path / "out.jsonl"
    assert answered(target) == frozenset()
    target.write_bytes(b'{"line": 4, "answer": "x"}\n{"line": 5, "an')
    assert answered(target) == {4}
    assert target.read_bytes() == b'{"line": 4, "answer": "x"}\n'


@pytest.mark.parametrize("content", [b"something\n", b"[1]\n", b'{"answer": 1}\n', b"no line end"])
def test_other_files_are_not_touched(tmp_path, content):
    target = tmp_path / "out.jsonl"
    target.write_bytes(content)
    with pytest.raises(PromptError, match="something else than answers of lapilli batch"):
        answered(target)
    assert target.read_bytes() == content


def test_empty_lines_keep_their_number(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("a\n\n  \nb\n", encoding="utf-8")
    assert read_lines(source) == [Line(1, "a"), Line(4, "b")]


def test_pictures_lie_beside_the_file(tmp_path):
    row = {"question": "Q", "images": ["a.png", "/b.png", "https://c/d.png"], "system": "S"}
    head, messages = parse(Line(3, json.dumps(row)), tmp_path)
    assert head == {"line": 3}
    assert [message.role for message in messages] == ["system", "user"]
    sources = [part.source for part in messages[1].media]
    assert sources == [str(tmp_path / "a.png"), "/b.png", "https://c/d.png"]
