"""`lapilli build`: the words, options and exit codes around `build_llava`."""

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from lapilli.cli.build import build
from tests.cli.conftest import Run
from tests.train.parts import Parts

pytestmark = pytest.mark.slow


def test_every_option_reaches_the_checkpoint(tmp_path: Path) -> None:
    app, run = typer.Typer(), CliRunner().invoke
    app.command()(build)
    base, eyes = Parts(tmp_path)("llama", "clip")
    out = tmp_path / "out"
    program = [str(out), "--language", base, "--vision", eyes]
    plain = run(app, program)
    assert plain.exit_code == 0, plain.output
    assert "train it with `lapilli train`" in plain.stderr
    written = json.loads((out / "config.json").read_text())
    assert (written["torch_dtype"], written["image_aspect_ratio"]) == ("bfloat16", "pad")

    options = ["--projector", "linear", "--template", "chatml_direct", "--select-layer", "-1"]
    options += ["--select-feature", "cls_patch", "--aspect", "square", "--dtype", "float32"]
    options += ["--tower", "inside", "--seed", "7", "--start-end", "--patch-token"]
    done = run(app, [*program, *options, "--force", "--overwrite", "--quiet"])
    assert (done.exit_code, done.output) == (0, "")
    expected = {
        "mm_projector_type": "linear",
        "lapilli_template": "chatml_direct",
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "cls_patch",
        "image_aspect_ratio": "square",
        "torch_dtype": "float32",
        "mm_use_im_start_end": True,
        "mm_use_im_patch_token": True,
    }
    written = json.loads((out / "config.json").read_text())
    assert {name: written.get(name) for name in expected} == expected
    state = load_file(out / "model.safetensors")
    assert any("vision_tower" in name for name in state)
    torch.manual_seed(7)
    drawn = torch.nn.Linear(24, 32).weight
    assert torch.equal(state["model.mm_projector.weight"], drawn.bfloat16().float())


def test_a_llava_is_no_language_model(lapilli: Run, tmp_path: Path) -> None:
    done = lapilli("build", "--language", "pebble", "--vision", "pebble", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "is a LLaVA already: train it as it is" in done.stderr
    assert len(done.stderr.splitlines()) == 1


USER = 'user={"kind": "vector", "width": 4}'


def test_modalities_are_declared(tmp_path: Path) -> None:
    app, run = typer.Typer(), CliRunner().invoke
    app.command()(build)
    base, eyes = Parts(tmp_path)("llama", "clip")
    (tmp_path / "more.toml").write_text('[item]\nkind = "vector"\nwidth = 3\n')
    more = ["--modality", USER, "--modalities", str(tmp_path / "more.toml")]
    for out, others in (("plain", []), ("llava", ["--vision", eyes])):
        done = run(app, [str(tmp_path / out), "--language", base, *others, *more])
        assert done.exit_code == 0, done.output
        written = json.loads((tmp_path / out / "config.json").read_text())
        assert list(written["lapilli_modalities"]) == ["item", "user"]
        assert written["model_type"] == ("llava_llama" if others else "llama")
        state = load_file(tmp_path / out / "model.safetensors")
        assert state["lapilli_modalities.user.projector.0.weight"].dtype == torch.bfloat16
    again = run(
        app,
        [
            str(tmp_path / "both"),
            "--language",
            str(tmp_path / "llava"),
            "--modality",
            USER.replace("user", "third"),
            "--quiet",
        ],
    )
    assert (again.exit_code, again.output) == (0, "")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "nothing is added to the language model: give --vision or --modality"),
        (["--modality", "user"], "expected NAME=SETTINGS"),
        (["--modality", "user={"], "--modality user: the settings are no JSON"),
        (["--modality", USER, "--modality", USER], "the modality 'user' is given twice"),
        (["--modality", USER.replace("vector", "sound")], "the kind 'sound' of a modality is unk"),
        (["--modality", USER.replace("width", "wide")], "has a key 'wide', which nothing reads"),
    ],
)
def test_what_declares_no_modality(tmp_path: Path, options, match) -> None:
    app = typer.Typer()
    app.command()(build)
    done = CliRunner().invoke(app, [str(tmp_path / "out"), "--language", "pebble", *options])
    assert match in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_parts_are_asked_for(lapilli: Run, tmp_path: Path) -> None:
    done = lapilli("build", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "--language" in done.stderr
