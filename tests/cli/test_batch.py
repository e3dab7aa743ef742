"""`lapilli batch`: a line for every line, errors among them, and killed in the middle."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapilli.cli import answers, questions
from lapilli.cli.answers import AnswerFile
from lapilli.cli.batch import answer_lines
from lapilli.cli.questions import Line, read_lines
from lapilli.cli.terminal import open_stores
from lapilli.errors import GenerationError, LapilliError, PromptError
from lapilli.store import StoreWriter
from lapilli.train.build import add_modalities
from tests.cli.conftest import PROGRAM
from tests.modality.declared import tiny_language_model

FEW = ("--max-new-tokens", "5", "--device", "cpu", "--dtype", "float32")


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def results(path: Path) -> dict[int, dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len({row["line"] for row in rows}) == len(rows)
    return {row["line"]: row for row in rows}


@pytest.mark.slow
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


@pytest.mark.slow
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


POISON = {
    "an address that ends inside": '{"question": "x", "images": ["http://["]}',
    "a closed port": '{"question": "x", "image": "http://127.0.0.1:1/x.png"}',
    "a broken data URI": '{"question": "x", "image": "data:image/png;base64,@@"}',
    "a folder": '{"question": "x", "image": "."}',
    "no path": '{"question": "x", "image": ""}',
    "half a character": '{"question": "\\ud800"}',
    "half a character in a path": '{"question": "x", "image": "\\ud800.png"}',
    "half a character in instructions": '{"question": "x", "system": "\\ud800"}',
    "nested": "[" * 100_000,
    "nested objects": '{"question": ' * 50_000,
    "not a number": '{"question": "x", "id": NaN}',
    "infinity": '{"question": "x", "id": 1e999}',
    "thousands of digits": '{"question": "x", "id": ' + "7" * 10_000 + "}",
    "a list": "[]",
    "a number": "7",
    "wrong question": '{"question": ["x"]}',
    "wrong instructions": '{"question": "x", "system": 7}',
    "wrong image": '{"question": "x", "image": {"path": "a"}}',
    "standard input": '{"question": "x", "image": "-"}',
    "image and images": '{"question": "x", "image": "a", "images": ["b"]}',
    "image that is false": '{"question": "x", "image": false}',
}  # fmt: skip
HARMLESS = {
    "an id of half a character": '{"question": "x", "id": "\\ud800"}',
    "other ends of lines": '{"question": "x\u2028y\x85z", "id": "\u2029"}',
    "no picture": '{"question": "x", "image": null, "images": null, "system": null}',
    "other keys": '{"question": "x", "note": 7}',
}


@pytest.mark.slow
def test_no_line_stops_the_run(lapilli, checkpoint, tmp_path):
    damaged = tmp_path / "damaged.avif"
    damaged.write_bytes(DAMAGED_AVIF)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [*POISON.values(), json.dumps({"question": "x", "image": str(damaged)})]
    good = [*HARMLESS.values(), '{"question": "last"}']
    source.write_bytes("\r\n".join([*bad, *good]).encode() + b"\n\xff\xfe\n")
    done = lapilli("batch", str(source), str(target), "--model", checkpoint, *FEW)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = results(target)
    assert sorted(found) == list(range(1, len(bad) + len(good) + 2))
    for number, row in found.items():
        is_good = len(bad) < number <= len(bad) + len(good)
        assert ("answer" in row) is is_good, row
        assert ("error" in row) is not is_good
    assert found[len(bad) + 1]["id"] == "\ud800"
    assert found[len(bad) + 2]["id"] == "\u2029"


# A header that promises a picture, and no picture.
DAMAGED_AVIF = bytes.fromhex("0000001c667479706176696600000000617669666d6966316d696166") + bytes(64)


@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_whatever_a_line_holds_it_is_a_question_or_an_error(content):
    question = Line(3, content).question(Path("/pictures"))
    assert question.head["line"] == 3
    assert ("error" in question.head) is (question.messages == ())


@pytest.mark.parametrize(
    "content", [b'{"question": "a", "question": "b"}', b'{"question": "a", "x": {"y": 1, "y": 2}}']
)
def test_a_line_that_says_a_key_twice_is_an_error(content):
    found = Line(3, content).question(Path("/pictures"))
    assert "comes twice in one object" in found.head["error"]


def fake(answers):
    """A session that gives an answer for every question, or raises what stands in its place."""

    def answer(messages, _params=None):
        said = answers[messages[-1].text]
        if isinstance(said, Exception):
            raise said
        return SimpleNamespace(text=said, finish_reason="stop", prompt_len=1, token_ids=[1])

    def as_completed(conversations, params):
        together = []
        for at, messages in enumerate(conversations):
            together.append((at, messages))
            if len(together) == 3:
                yield from [(i, answer(one, params)) for i, one in reversed(together)]
                together = []
        yield from [(i, answer(one, params)) for i, one in together]

    return SimpleNamespace(answer=answer, as_completed=as_completed)


@pytest.mark.parametrize(
    "error", [RuntimeError("a product"), GenerationError("one"), MemoryError()]
)
def test_an_error_stays_with_the_line_that_it_belongs_to(error):
    answers = {f"q{i}": f"a{i}" for i in range(20)} | {"q4": error, "q11": error, "q19": error}
    lines = [Line(i + 1, json.dumps({"question": q}).encode()) for i, q in enumerate(answers)]
    lines.insert(5, Line(21, b"no JSON"))
    rows = {row["line"]: row for row in answer_lines(fake(answers), lines, Path(), {})}
    assert sorted(rows) == list(range(1, 22))
    assert [n for n, row in rows.items() if "error" in row and n != 21] == [5, 12, 20]
    assert all(rows[i + 1]["answer"] == f"a{i}" for i in range(20) if i not in (4, 11, 19))
    expected = str(error) if isinstance(error, LapilliError) else type(error).__name__
    assert expected in rows[5]["error"]


@pytest.mark.slow
def test_every_row_failed(lapilli, checkpoint, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"question": "x", "image": "missing.png"}] * 2)
    for _ in range(2):  # and a second time, when there is nothing to do
        done = lapilli("batch", str(source), str(tmp_path / "o"), "--model", checkpoint, *FEW)
        assert done.returncode == 1


@pytest.mark.slow
def test_changed_lines_are_answered_again(lapilli, checkpoint, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    command = ("batch", str(source), str(target), "--model", checkpoint, *FEW)
    write(source, [{"question": "a", "id": 1}, {"question": "b"}, {"question": "c"}])
    lapilli(*command)
    before = results(target)
    target.chmod(0o640)
    write(source, [{"question": "a", "id": 2}, {"question": "b"}])
    done = lapilli(*command)
    assert done.returncode == 0
    assert "1 of 2 lines are in" in done.stderr
    assert "2 results are errors that are retried, or of lines that were changed" in done.stderr
    after = results(target)
    assert sorted(after) == [1, 2]
    assert (after[1]["id"], after[2]) == (2, before[2])
    assert sorted(results(tmp_path / "out.jsonl.old")) == [1, 3]
    assert target.stat().st_mode & 0o777 == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.old"}


def answers_in(target: Path, *contents: bytes) -> AnswerFile:
    source = target.with_name("source")
    source.touch()
    lines = [Line(number, content) for number, content in enumerate(contents, 1)]
    return AnswerFile(target, lines, source=source)


def damaged_avif() -> bytes:
    """A whole header whose pixels are no AV1, for which Pillow raises a RuntimeError."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(stream, "AVIF")
    start = stream.getvalue().index(b"mdat") + 4
    return stream.getvalue()[:start] + b"\xff" * (len(stream.getvalue()) - start)


ALONE = {
    "an address that ends inside": b'{"question": "x", "images": ["http://["]}',
    "half a character": b'{"question": "\\ud800"}',
    "nested": b"[" * 100_000,
    "a damaged picture": b'{"question": "x", "image": "damaged.avif"}',
}


@pytest.mark.slow
@pytest.mark.parametrize("line", ALONE.values(), ids=ALONE.keys())
def test_the_line_after_a_bad_one_is_answered(lapilli, checkpoint, tmp_path, line):
    (tmp_path / "damaged.avif").write_bytes(damaged_avif())
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line + b'\n{"question": "last"}\n')
    done = lapilli("batch", str(source), str(target), "--model", checkpoint, *FEW)
    assert done.returncode == 0, done.stderr
    found = results(target)
    assert "error" in found[1]
    assert "answer" in found[2]


@pytest.mark.slow
def test_one_question_is_one_answer_whatever_is_in_it(lapilli, checkpoint, tmp_path):
    """A byte order mark, and characters at which Python's splitlines() splits."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = '{"question": "x\u2028y", "id": 1}\n{"question": "x\x85y", "id": 2}\n'
    source.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    done = lapilli("batch", str(source), str(target), "--model", checkpoint, *FEW)
    assert done.returncode == 0, done.stderr
    found = [json.loads(row) for row in target.read_text("utf-8").split("\n")[:-1]]
    assert sorted((row["line"], row["id"]) for row in found) == [(1, 1), (2, 2)]
    assert all("answer" in row for row in found)


@pytest.mark.slow
def test_a_last_row_that_is_cut_off_is_no_success(lapilli, checkpoint, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [{"question": "a"}])
    command = ("batch", str(source), str(target), "--model", checkpoint, "--quiet", *FEW)
    assert lapilli(*command).returncode == 0
    whole = target.read_bytes()
    target.unlink()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 5, len(whole) - 5))

    done = lapilli(*command, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.endswith(f"{os.strerror(errno.EFBIG)}\n")
    assert lapilli(*command).returncode == 0
    assert target.read_bytes() == whole


@pytest.mark.slow
def test_a_second_program_on_one_output_is_refused(lapilli, checkpoint, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [{"question": f"number {i}"} for i in range(300)])
    command = ["batch", str(source), str(target), "--model", checkpoint, "--rows", "2", *FEW]
    first = subprocess.Popen(
        [str(PROGRAM), *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    try:
        while not target.exists() or not target.stat().st_size:
            assert first.poll() is None
            time.sleep(0.02)
        done = lapilli(*command)
    finally:
        first.kill()
        first.communicate()
    assert done.returncode == 2
    assert "is being written by another lapilli batch" in done.stderr


def test_torn_lines_are_dropped(tmp_path):
    target = tmp_path / "out.jsonl"
    with answers_in(target) as answers:
        assert answers.done == frozenset()
    target.write_bytes(b'{"line": 4, "answer": "x"}\n{"line": 5, "an')
    with answers_in(target, *b"abcde".split()) as answers:
        assert answers.done == frozenset()  # there is no line 4
    target.write_bytes(b'{"line": 1, "answer": "x"}\n{"line": 2, "an')
    with answers_in(target, b"a", b"b") as answers:
        assert answers.done == {1}  # written before lines had digests
        answers.add({"line": 2, "error": "y"})
    torn = b'{"line": 1, "answer": "x"}\n{"line": 2, "an{"line": 3, "answer": "z"}\n'
    target.write_bytes(torn)
    with answers_in(target, b"a", b"b", b"c") as answers:
        assert answers.done == {1}
        assert answers.num_answers == 1
    assert target.read_bytes() == b'{"line": 1, "answer": "x"}\n'


@pytest.mark.parametrize(
    "content",
    [b"something\n", b"[1]\n", b'{"answer": 1}\n', b"no line end", b'{"line": "1"}\n', bytes(9)],
)
def test_other_files_are_not_touched(tmp_path, content):
    target = tmp_path / "out.jsonl"
    target.write_bytes(content)
    with pytest.raises(PromptError, match="something else than answers of lapilli batch"):
        answers_in(target)
    assert target.read_bytes() == content


def test_a_short_write_is_gone_on_with(tmp_path, monkeypatch):
    write_some = os.write
    with answers_in(tmp_path / "out.jsonl") as answers:
        monkeypatch.setattr(os, "write", lambda number, rest: write_some(number, rest[:5]))
        answers.add({"line": 1, "answer": "a long one"})
    assert results(tmp_path / "out.jsonl")[1]["answer"] == "a long one"


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(lapilli, checkpoint, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"question": f"number {i}"} for i in range(8)])
    target = tmp_path / "out.jsonl"
    command = ("batch", str(source), str(target), "--model", checkpoint, "--rows", "1", *FEW)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    done = lapilli(*command, "--quiet", preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr == f"lapilli: {target}: {os.strerror(errno.EFBIG)}\n"
    assert target.stat().st_size == 300
    assert lapilli(*command).returncode == 0
    assert sorted(results(target)) == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_devices(lapilli, checkpoint, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"question": "a"}])
    done = lapilli("batch", str(source), "/dev/full", "--model", checkpoint, "-q", *FEW)
    assert (done.returncode, done.stderr) == (2, f"lapilli: /dev/full: {os.strerror(28)}\n")
    done = lapilli("batch", str(source), "/dev/stdout", "--model", checkpoint, "-q", *FEW)
    assert done.returncode == 0
    assert json.loads(done.stdout)["line"] == 1


@pytest.mark.slow
def test_outputs_that_cannot_be(lapilli, checkpoint, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"question": "a"}])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(source)
    expected = {
        "nowhere/out.jsonl": "No such file or directory",
        ".": "is a folder: name a file for the answers",
        "in.jsonl": "is the input: name another file",
        "link": "is the input: name another file",
        "pipe": "is a pipe that nobody reads",
    }
    for name, message in expected.items():
        done = lapilli("batch", str(source), str(tmp_path / name), "--model", checkpoint, *FEW)
        assert done.returncode == 2, name
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    done = lapilli("batch", str(source), "", "--model", checkpoint, *FEW)  # an unset variable
    assert (done.returncode, done.stderr) == (
        2,
        "lapilli: . is a folder: name a file for the answers\n",
    )
    assert source.read_text() == '{"question": "a"}\n'


def test_a_second_process_is_refused(tmp_path):
    target = tmp_path / "out.jsonl"
    with answers_in(target, b"a") as first:
        with pytest.raises(PromptError, match="is being written by another lapilli batch"):
            answers_in(target, b"a")
        first.add({"line": 1, "asked": "other", "answer": "x"})
    with answers_in(target, b"a") as second:  # which puts another file into its place
        assert second.stale == 1
        with pytest.raises(PromptError, match="is being written"):
            answers_in(target, b"a")


def test_lines_keep_their_number_whatever_ends_them(tmp_path):
    source = tmp_path / "in.jsonl"
    expected = [Line(1, b"a"), Line(4, "\u2028b\x0cc\x85".encode())]
    text = "a\n\n  \n\u2028b\x0cc\x85\n"
    for content in (
        text.encode(),
        text.encode("utf-8-sig"),
        text.replace("\n", "\r\n").encode("utf-16"),
        b"\xfe\xff" + text.encode("utf-16-be"),
    ):
        source.write_bytes(content)
        assert read_lines(source) == expected
    source.write_bytes(b"\xff\xfea")
    with pytest.raises(PromptError, match="begins as UTF-16 and is none"):
        read_lines(source)


def test_lines_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "MOST_BYTES", 100)
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"a\n" + b"b" * 100)
    assert [line.number for line in read_lines(source)] == [1, 2]
    for content in (b"a\n" + b"b" * 101, b"a\n" + b" " * 101, ("a\n" + "b" * 101).encode("utf-16")):
        source.write_bytes(content)
        with pytest.raises(PromptError, match=r"in\.jsonl: line 2 has more than 100 bytes"):
            read_lines(source)
    os.mkfifo(tmp_path / "pipe")
    for content in (b"a\n" * 50, b"a\n" * 51):
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
        writer.start()
        if len(content) == 100:
            assert len(read_lines(tmp_path / "pipe")) == 50
        else:
            with pytest.raises(PromptError, match="pipe is no regular file and gives more than"):
                read_lines(tmp_path / "pipe")
        writer.join()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a device of Linux")
def test_a_device_without_an_end():
    with pytest.raises(PromptError, match="/dev/zero is no regular file and gives more than"):
        read_lines(Path("/dev/zero"))


def test_a_huge_file_of_somebody_else_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MOST_BYTES", 1 << 20)
    target = tmp_path / "out.jsonl"
    with target.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PromptError, match="something else than answers of lapilli batch"):
        answers_in(target)


def test_pictures_lie_beside_the_file(tmp_path):
    pictures = ["a.png", "/b.png", "https://c/d.png", "FILE:///e.png"]
    row = {"question": "Q", "images": pictures, "system": "S"}
    line = Line(3, json.dumps(row).encode())
    question = line.question(tmp_path)
    assert question.head == {"line": 3, "asked": line.digest}
    assert [message.role for message in question.messages] == ["system", "user"]
    sources = [part.source for part in question.messages[1].media]
    assert sources == [str(tmp_path / "a.png"), *pictures[1:]]


@pytest.mark.slow
def test_a_typed_placeholder_stays_text(lapilli, checkpoint, picture, tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        [{"question": "<image> a"}, {"question": "<image> b", "image": picture}],
    )
    command = ("batch", str(source), str(tmp_path / "o"), "--model", checkpoint, *FEW)
    assert lapilli(*command).stderr.startswith("line 2: <image> in the question stays text")


@pytest.mark.slow
def test_ids_of_a_store_stand_for_vectors(lapilli, tmp_path):
    settings = {"vec": {"kind": "vector", "width": 3}}
    add_modalities(tiny_language_model(tmp_path / "plain"), tmp_path / "model", settings)
    with StoreWriter(tmp_path / "s", encoder="e") as writer:
        writer.add(["shoe", 7], torch.randn(2, 3))
    rows = [{"question": "What next?", "vec": one} for one in ("shoe", 7, "boot")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = (str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    command = ("batch", *files, "--model", str(tmp_path / "model"), "--max-new-tokens", "3")
    done = lapilli(*command, "--store", f"vec={tmp_path / 's'}")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    found = {row["line"]: row for row in map(json.loads, lines)}
    assert "answer" in found[1]
    assert "answer" in found[2]
    assert "vec: " in found[3]["error"]
    assert "has no entry for 'boot'" in found[3]["error"]
    with StoreWriter(tmp_path / "s", encoder="e") as writer:
        writer.add(["boot"], torch.randn(1, 3))
    store = ("--store", f"vec={tmp_path / 's'}")
    assert "3 of 3 lines are in" in lapilli(*command, *store).stderr
    done = lapilli(*command, *store, "--retry")
    assert "2 of 3 lines are in" in done.stderr
    rows = (tmp_path / "out.jsonl").read_text().splitlines()
    again = {row["line"]: row for row in map(json.loads, rows)}
    assert again[1] == found[1]
    assert "answer" in again[3]
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["vec"], "--store 'vec': expected NAME=STORE, a modality and a folder"),
        (["=s"], "--store '=s': expected NAME=STORE"),
        (["vec=nothing"], "nothing is not there: expected a store"),
    ],
)
def test_options_that_name_no_store(options, says):
    with pytest.raises(LapilliError, match=says):
        open_stores(options)


def test_a_store_is_named_once(tmp_path):
    with StoreWriter(tmp_path / "s", encoder="e", width=3):
        pass
    with pytest.raises(LapilliError, match="names the modality 'vec' twice"):
        open_stores([f"vec={tmp_path / 's'}"] * 2)
