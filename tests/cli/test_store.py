"""`lapilli store`: once as a process, else in this one."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lapilli.cli import store as cli
from lapilli.store import Store


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("id,text\n1,a red square\n2,a blue circle\n")
    return path


def test_build_twice_and_look(items, tmp_path):
    folder = tmp_path / "s"
    options = ("--encoder", "pebble", "--device", "cpu", "--tokens", 2)
    code, out, err = run("build", items, folder, *options)
    assert (code, out) == (0, "")
    assert "2 of 2 items encoded" in err
    items.write_text(f"{items.read_text()}3,two green lines\n")
    assert "1 of 3 items encoded" in run("build", items, folder, *options)[2]
    code, out, _ = run("info", folder, "--verify")
    assert code == 0
    assert out.startswith("3 entries of 2 x 256 float16\n")
    assert "3 rows of encoder sha256:" in out
    said = json.loads(run("info", folder, "--json")[1])
    assert said["entries"] == 3
    assert said["stamps"][0]["rows"] == 3
    assert "bytes are free again" in run("compact", folder)[2]
    assert run("compact", folder, "--quiet")[2] == ""
    assert Store.open(folder).info().shards == 1


def test_there_and_back(items, tmp_path):
    folder = tmp_path / "s"
    assert run("build", items, folder, "--encoder", "pebble", "--device", "cpu")[0] == 0
    for form in ("parquet", "arrow", "npy"):
        file = tmp_path / f"out.{form}"
        assert run("export", folder, file, "--to", form)[0] == 0
        named = ("--encoder", "x") if form == "npy" else ()
        code, _, err = run("import", file, tmp_path / form, *named)
        assert code == 0
        assert "2 entries are new or changed" in err
        back = Store.open(tmp_path / form)
        assert torch.equal(back.get([1, 2]), Store.open(folder).get([1, 2]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("info", "nothing"), "nothing is not there: expected a store"),
        (("compact", "nothing"), "nothing is not there: expected a store"),
        (("build", "nothing.csv", "s", "--encoder", "pebble"), "nothing.csv is no file"),
        (("export", "nothing", "out", "--to", "npy"), "nothing is not there"),
        (("import", "a.npy", "s", "--encoder", "e"), "a.npy is not there"),
    ],
)
def test_errors_are_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_the_program(lapilli, items, tmp_path):
    done = lapilli("store", "build", str(items), str(tmp_path / "s"), "--encoder", "pebble")
    assert done.returncode == 0, done.stderr
    assert lapilli("store", "info", str(tmp_path / "s")).stdout.startswith("2 entries of 1 x 256")
