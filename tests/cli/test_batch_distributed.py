"""`lapilli batch --engine ray`: the rows of one process, with workers killed, and the command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image, ImageDraw

# Ray warns about settings of its own that nobody has set.
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),  # several clusters begin, which takes a minute each on a busy machine
    pytest.mark.filterwarnings("ignore:::ray"),
]
FEW = ("--max-new-tokens", "6", "--device", "cpu", "--dtype", "float32", "--quiet")
RAY = ("--engine", "ray", "--workers", "2", "--rows", "4")
ROWS = int(os.environ.get("LAPILLI_KILL_ROWS", "200"))
PROGRAM = (sys.executable, "-c", "from lapilli.cli.main import main; main()", "batch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("red", "blue"):
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).ellipse((32, 32, 64, 64), fill=name)
        image.save(folder / f"{name}.png")
    return folder


def write(folder: Path, count: int) -> Path:
    """Write questions, a line that is no JSON and one about a picture that is not there."""
    path = folder / f"in{count}.jsonl"
    rows = [
        {"id": n, "question": f"What is shown? {n}", "image": ("red.png", "blue.png")[n % 2]}
        for n in range(count - 2)
    ]
    lines = [json.dumps(row) for row in (*rows, {"question": "x", "image": "missing.png"})]
    path.write_text("\n".join([*lines, "no JSON"]))
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def run(*arguments: object) -> str:
    process = start(*arguments)
    said = process.communicate(timeout=280)[1]
    assert process.returncode == 0, said
    return said


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    with suppress(psutil.Error):
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                if "MapWorker" in " ".join(one.cmdline()):
                    found.append(one)
    return found


def until(condition: Callable[[], object]) -> None:
    """Wait until it holds, without taking much of the processors that others need."""
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def has_rows(path: Path, count: int) -> bool:
    return path.exists() and len(rows_of(path)) >= count


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[dict[str, object]]:
    """What one process answers."""
    source, target = write(folder, ROWS), folder / "plain.jsonl"
    run(source, target, *FEW)
    return sorted(rows_of(target), key=lambda row: row["line"])


def test_a_killed_worker_and_a_killed_command_cost_no_row(folder, plain, tmp_path):
    source, target = folder / f"in{ROWS}.jsonl", tmp_path / "out.jsonl"
    process = start(source, target, *FEW, *RAY)

    def kill_one() -> bool:
        for victim in workers_of(process):
            with suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)
                return True
        return False

    try:
        until(lambda: has_rows(target, 20))
        until(kill_one)
        at_kill = len(rows_of(target))
        assert at_kill < len(plain)
        until(lambda: has_rows(target, at_kill + 20) or process.poll() is not None)
    finally:
        process.kill()
        said = process.communicate()[1]
    before = rows_of(target)
    assert len({row["line"] for row in before}) == len(before) > at_kill, said
    run(source, target, *FEW, *RAY)
    assert rows_of(target) == plain


def test_parquet_and_folders(folder, tmp_path):
    import pyarrow
    from pyarrow.parquet import read_table, write_table

    pictures = [(folder / f"{name}.png").read_bytes() for name in ("red", "blue")]
    table = {
        "id": ["a", "b", "c"],
        "question": ["What is shown?", "What is shown?", "  "],
        "image": [*pictures, None],
    }
    source = tmp_path / "in.parquet"
    write_table(pyarrow.table(table), source, row_group_size=1)
    run(source, tmp_path / "out.parquet", *FEW, *RAY)
    run(source, tmp_path / "local.parquet", *FEW)
    found = read_table(tmp_path / "out.parquet").to_pylist()
    assert found == read_table(tmp_path / "local.parquet").to_pylist()
    assert [row["line"] for row in found] == [1, 2, 3]
    assert [row["id"] for row in found] == ["a", "b", "c"]
    assert "red" in found[0]["answer"]
    assert "blue" in found[1]["answer"]
    assert 'no "question"' in found[2]["error"]

    run(folder, tmp_path / "folder.jsonl", "--question", "What is shown?", *FEW, *RAY)
    of_folder = {row["id"]: row["answer"] for row in rows_of(tmp_path / "folder.jsonl")}
    assert of_folder == {"red.png": found[0]["answer"], "blue.png": found[1]["answer"]}


def test_what_is_wrong_is_said(folder, tmp_path):
    source = write(folder, 4)
    process = start(source, tmp_path / "o.jsonl", *RAY, "--model", str(tmp_path), *FEW)
    said = process.communicate(timeout=280)[1]
    assert process.returncode == 2
    assert "a worker of Ray has no engine: " in said
    assert "Traceback" not in said
