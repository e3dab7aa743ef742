"""`lapilli data`: once as a process, else in this one, which saves importing torch each time."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lapilli.cli import data


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    records = [
        {"id": "one", "image": "red.png", "conversations": turns("<image>\nWhat?", "Red.")},
        {"id": "two", "conversations": turns("Hello", "Hi!")},
        {"id": "three", "conversations": turns("Hello", "")},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `lapilli data`, in this process."""
    done = CliRunner().invoke(data.app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.slow
def test_the_program_checks_and_shows(lapilli, file):
    done = lapilli("data", "check", str(file))
    assert done.returncode == 1
    assert "3 samples, 1 with images" in done.stdout
    assert f"{file}:29 (id 'three'): empty answer (number 1)" in done.stdout
    assert done.stderr == ""
    done = lapilli("data", "show", str(file), "-n", "1")
    assert done.returncode == 0
    title, *text = done.stdout.splitlines()
    assert title == f"--- {file}:2 (id 'one')"
    assert "\n".join(text).endswith("USER: <image>\nWhat? ASSISTANT:[[ Red.</s>]]")


def test_check_with_a_model_counts_tokens(file, checkpoint):
    code, out, _ = run("check", file, "--model", checkpoint, "--max-length", 70, "--json")
    assert code == 1
    report = json.loads(out)
    assert report["max_length"] == 70
    assert report["positions"]["max"] > 70
    assert {finding["kind"] for finding in report["findings"]} >= {"too long", "empty answer"}


def test_check_of_good_data_leaves_with_0(file, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "good.json"
    elsewhere.write_text(json.dumps(json.loads(file.read_text())[:2]))
    code, out, _ = run("check", elsewhere, "--images", file.parent)
    assert (code, out.splitlines()[-1]) == (0, "nothing is wrong")
    assert run("check", elsewhere)[0] == 1


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("check", ("gone.json",), "gone.json is no file"),
        ("show", ("gone.json",), "gone.json is no file"),
        ("check", ("--placement", "back"), "--placement is 'back': expected front or written"),
        ("show", ("--color", "red"), "--color is 'red': expected auto, always or never"),
        ("show", ("--template", "x"), "no template is called 'x'"),
        ("check", ("--template", "x"), "no template is called 'x'"),
        ("show", ("--start", 3), "--start is 3, and"),
        ("check", ("--max-length", 9), "--max-length counts the positions of a model: give --mo"),
        ("check", ("--images", "lost"), "lost is no folder: expected that of the images"),
    ],
)
def test_bad_input_is_one_line_and_2(file, command, options, expected):
    given = options if options == ("gone.json",) else (file, *options)
    code, out, err = run(command, *given)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


def test_turns_are_those_of_the_template(tmp_path):
    one = {"id": "one", "conversations": turns("Q", "A") + turns("R", "B")[1:]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(one))
    code, out, _ = run("check", path)
    assert code == 1
    assert f"{path}:1 (id 'one'): message 2 is from assistant, expected user" in out
    path.write_text(json.dumps(one | {"conversations": turns("Q", "A")}))
    assert run("check", path)[0] == 0
    assert "a plain template trains on" in run("check", path, "--template", "plain")[1]


def test_show_takes_a_template_and_a_beginning(file):
    code, out, _ = run("show", file, "-n", 9, "--start", 1, "--template", "mpt")
    assert code == 0
    assert "[[Hi!<|im_end|>]]" in out
    assert out.count("---") == 2


def test_show_with_a_model_shows_positions_in_colour(file, checkpoint):
    code, out, _ = run("show", file, "-n", 1, "--model", checkpoint, "--color", "always")
    assert code == 0
    assert "<image: " in out
    assert " positions>" in out
    assert "\x1b[32m" in out
    assert "[[" not in out


def test_show_goes_on_after_a_bad_sample(file):
    records = json.loads(file.read_text())
    records[0]["conversations"][0]["from"] = "robot"
    file.write_text(json.dumps(records))
    code, out, err = run("show", file, "-n", 2)
    assert code == 0
    assert "cannot be learned: " in err
    assert "from 'robot'" in err
    assert "[[ Hi!</s>]]" in out
