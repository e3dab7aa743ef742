"""`lapilli ask --media`: media of declared modalities: JSON, files of it, and ids of a store."""

import json

import pytest
import torch
from typer.testing import CliRunner

import lapilli
from lapilli.cli.main import app
from lapilli.cli.terminal import read_media
from lapilli.errors import ConfigError, GenerationError, MediaError
from lapilli.store import StoreWriter
from lapilli.train.build import add_modalities

SHORT = ("--max-new-tokens", "4", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("ask") / "model"
    add_modalities("pebble", folder, {"item": {"kind": "vector", "width": 3}})
    return str(folder)


def ask(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["ask", "What is it?", *arguments, *SHORT])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def test_a_medium_is_what_it_is_in_python(model, tmp_path) -> None:
    chat = lapilli.load(model, device="cpu")
    expected = chat.ask("What is it?", item=[1.0, -2.0, 0.5], max_new_tokens=4)
    (tmp_path / "v.json").write_text("[1, -2, 0.5]")
    with StoreWriter(tmp_path / "s", encoder="e") as writer:
        writer.add(["shoe"], torch.tensor([[1.0, -2.0, 0.5]]))
    for media in ("item=[1, -2, 0.5]", f"item={tmp_path / 'v.json'}"):
        assert ask("--model", model, "--media", media) == expected
    store = f"item={tmp_path / 's'}"
    assert ask("--model", model, "--media", "item=shoe", "--store", store) == expected
    said = ask("--model", model, "--media", "item=[1, -2, 0.5]", "--json")
    assert json.loads(said)["answer"] == expected


@pytest.mark.parametrize(
    ("media", "says"),
    [("temperature=2", "temperature"), ("image=a.png", "pictures stand behind the question")],
)
def test_a_name_of_no_modality_is_no_option(model, media, says) -> None:
    done = CliRunner().invoke(app, ["ask", "What?", "--model", model, "--media", media, *SHORT])
    assert done.exit_code != 0
    assert says in f"{done.output}{done.exception}"


def test_a_name_of_no_modality_is_said_in_python(model) -> None:
    chat = lapilli.load(model, device="cpu")
    with pytest.raises(GenerationError, match=r"option itm, and no modality either: the .* item$"):
        chat.ask("What?", itm=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (["item"], ConfigError, "--media 'item': expected NAME=VALUE"),
        (["item=1", "item=2"], ConfigError, "names the modality 'item' twice"),
        (["item=nowhere.json"], MediaError, "nowhere.json cannot be read: No such file"),
    ],
)
def test_what_is_no_medium(given, error, says) -> None:
    with pytest.raises(error, match=says):
        read_media(given)


def test_a_file_of_no_json(tmp_path) -> None:
    (tmp_path / "v.json").write_text("[1,")
    with pytest.raises(MediaError, match=r"v\.json is not valid JSON: "):
        read_media([f"item={tmp_path / 'v.json'}"])
    assert read_media(["item=i7", "user=7"]) == {"item": "i7", "user": 7}
