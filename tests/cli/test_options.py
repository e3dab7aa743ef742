"""Options that commands share: one frozen value, with the fields of SamplingParams in it."""

import gc
import inspect
import json
import shutil
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import lapilli
from lapilli.cli.ask import ask
from lapilli.cli.batch import batch
from lapilli.cli.chat import chat
from lapilli.cli.main import app
from lapilli.cli.terminal import ChatOptions, _say_what_is_odd, with_options
from lapilli.config.generation import SamplingParams
from lapilli.config.llava import SamplingNote

IN_TERMINAL = {
    one.name: one for one in fields(SamplingParams) if one.metadata["option"].in_terminal
}


@pytest.mark.parametrize("command", [ask, batch, chat])
def test_every_field_is_an_option_with_its_default(command):
    parameters = inspect.signature(with_options(command)).parameters
    assert "how" not in parameters
    for name, one in IN_TERMINAL.items():
        assert name in parameters
        several = not isinstance(one.default, int | float | None)
        assert parameters[name].default == (None if several else one.default)
    for one in fields(ChatOptions):
        assert one.name == "sampling" or parameters[one.name].default == one.default


def test_a_command_gets_what_was_said_as_one_frozen_value():
    seen = {}

    @with_options
    def command(how: ChatOptions, as_json: bool = False):
        seen.update(how=how, as_json=as_json)

    said = dict.fromkeys(IN_TERMINAL) | {"temperature": 0.5, "logit_bias": ["5=-100", "7=1.5"]}
    plain = {one.name: one.default for one in fields(ChatOptions) if one.name != "sampling"}
    command(**plain, **said | {"seed": 3}, as_json=True)
    how = seen["how"]
    assert how.sampling == {"temperature": 0.5, "logit_bias": ["5=-100", "7=1.5"], "seed": 3}
    assert (how.model, how.alpha, seen["as_json"]) == ("pebble", "drop", True)
    assert SamplingParams.from_options(**how.sampling).logit_bias == {5: -100.0, 7: 1.5}
    with pytest.raises(FrozenInstanceError):
        how.model = "other"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--logit-bias", "5", "ID=BIAS"),
        ("--logit-bias", "5=200", "logit_bias of token 5 must be in [-100, 100]"),
        ("--top-p", "0", "top_p must be in (0, 1]"),
    ],
)
def test_a_wrong_value_is_one_line_before_a_model_is_loaded(option, value, message):
    asked = ["ask", "Hello?", "--model", "no/such/folder/here", option, value]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_bias_forbids_a_token(lapilli, checkpoint):
    options = ("--max-new-tokens", "1", "--device", "cpu", "--dtype", "float32")
    free = lapilli("ask", "Hello?", "--model", checkpoint, *options)
    forced = lapilli("ask", "Hello?", "--model", checkpoint, *options, "--logit-bias", "70=100")
    assert free.returncode == forced.returncode == 0, forced.stderr
    assert free.stdout != forced.stdout


def test_a_note_about_sampling_is_told_by_its_kind_and_not_by_its_text(capsys):
    notes = ("generation_config.json is an old one", SamplingNote("top_k is not applied"))
    chat = SimpleNamespace(report=SimpleNamespace(notes=notes), model=torch.nn.Linear(1, 1))
    _say_what_is_odd(chat)
    written = capsys.readouterr().err
    assert "top_k is not applied\n" in written
    assert "an old one" not in written


@pytest.mark.slow
def test_settings_of_a_checkpoint_that_are_not_applied_are_told(lapilli, checkpoint, tmp_path):
    folder = tmp_path / "penal"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.3, "num_beams": 1}')
    asked = ("ask", "Hello?", "-m", str(folder), "--max-new-tokens", "2", "--device", "cpu")
    done = lapilli(*asked)
    assert done.returncode == 0
    expected = "generation_config.json asks for repetition_penalty = 1.3, which is not applied"
    assert [line[: len(expected)] for line in done.stderr.splitlines()] == [expected]
    assert lapilli(*asked, "--quiet").stderr == ""


@pytest.mark.slow
def test_a_tilde_is_the_home_in_every_path(lapilli, tmp_path, monkeypatch, picture):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "..")
    shutil.copy(picture, tmp_path / "a.png")
    (tmp_path / "in.jsonl").write_text('{"question": "What?", "image": "~/a.png"}\n')
    few = ("-m", "~/made", "--max-new-tokens", "2", "-q")
    for command in (
        ("export", "pebble", "~/made", "-q"),
        ("inspect", "~/made"),
        ("ask", "What?", "~/a.png", *few),
        ("batch", "~/in.jsonl", "~/out.jsonl", *few),
    ):
        done = lapilli(*command)
        assert done.returncode == 0, done.stderr
    assert "answer" in json.loads((tmp_path / "out.jsonl").read_text())
    assert not Path("~").exists()
    for command in (
        ("train", "~/none", "--out", "~/run"),
        ("data", "check", "~/none.csv"),
        ("ask", "What?", "~/none"),
    ):
        done = lapilli(*command)
        assert done.returncode == 2
        assert f"{tmp_path}/none" in done.stderr
        assert "~" not in done.stderr


@pytest.mark.parametrize("quiet", [False, True])
def test_what_was_loaded_is_no_matter_for_the_collector_of_a_program(monkeypatch, quiet):
    """A library may not choose that for the process: lapilli.load leaves it alone."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    lapilli.load("pebble", device="cpu")
    assert frozen == []
    ChatOptions(sampling={}, device="cpu", quiet=quiet).load()
    assert frozen == [1]


GRAMMARS = {
    "form.json": ('{"type": "boolean"}', "json_schema"),
    "form.regex": ("[0-9]{2}\n", "regex"),
    "form.txt": ("yes\n\nno\n", "choice"),
    "form.LARK": ('start: "a"\n', "lark"),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_file_says_the_form_of_an_answer(name, tmp_path):
    text, kind = GRAMMARS[name]
    (tmp_path / name).write_text(text)
    how = ChatOptions(sampling={"seed": 3}, schema=tmp_path / name)
    grammar = how.sampling["grammar"]
    assert (grammar.kind, how.sampling["seed"]) == (kind, 3)
    if kind != "json_schema":
        expected = {"regex": "[0-9]{2}", "choice": '["yes", "no"]', "lark": text}
        assert grammar.text == expected[kind]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("form.yaml", b"a: b", "must end in one of .json, .regex, .txt, .lark"),
        ("form.json", b"{", "form.json: the JSON schema is not JSON"),
        ("form.json", b"\xff", "form.json: not UTF-8 at byte 1"),
        ("form.txt", b"\n", "choices must be a list"),
        ("missing.json", None, "missing.json: No such file"),
    ],
)
def test_a_wrong_file_of_a_form_is_one_line_before_a_model_is_loaded(
    name, content, message, tmp_path
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = ["ask", "Is it?", "--schema", str(tmp_path / name), "--model", "nowhere"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_ask_and_batch_follow_a_schema(tmp_path):
    schema = {
        "type": "object",
        "properties": {"is_red": {"type": "boolean"}},
        "required": ["is_red"],
        "additionalProperties": False,
    }
    (tmp_path / "form.json").write_text(json.dumps(schema))
    form = ["--schema", str(tmp_path / "form.json"), "--quiet", "--device", "cpu"]
    done = CliRunner().invoke(app, ["ask", "Is it red?", *form])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) == {"is_red"}
    (tmp_path / "in.jsonl").write_text('{"question": "Is it red?"}\n{"question": "And you?"}\n')
    target = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, ["batch", str(tmp_path / "in.jsonl"), str(target), *form])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [set(json.loads(row["answer"])) for row in rows] == [{"is_red"}] * 2
