"""`lapilli train` as a process: both stages on a tiny LLaVA, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from lapilli.cli.terminal import plain_errors
from lapilli.cli.train import _run
from lapilli.train.recipe.file import load_recipe
from lapilli.train.trainer.loop import Stopped
from tests.cli.conftest import Run

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
COLOURS = {"red": (200, 20, 20), "green": (20, 180, 30), "blue": (20, 30, 220)}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one colour and their names, in LLaVA's format."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for i in range(12):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (40 + i, 50), COLOURS[name]).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": f"It is {name}."},
        ]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(records))
    return folder / "captions.json"


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_both_stages_learn_and_leave_a_model_that_answers(
    lapilli: Run, checkpoint: str, captions: Path, tmp_path: Path
) -> None:
    given = ("--model.checkpoint", checkpoint, "--data.sources", f'[{{path = "{captions}"}}]')
    align, instruct = tmp_path / "align", tmp_path / "instruct"
    done = lapilli("train", str(RECIPES / "align.toml"), "--out", str(align), *given)
    assert done.returncode == 0, done.stderr
    assert losses(align)[-1] < 0.6 * losses(align)[0]
    assert (align / "model" / "mm_projector.bin").is_file()
    done = lapilli(
        "train", str(RECIPES / "instruct.toml"), "--out", str(instruct), *given,
        "--model.projector", str(align),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(instruct)) == 10
    assert losses(instruct)[-1] < 0.6 * losses(instruct)[0]
    picture = str(captions.parent / "0.png")
    asked = ("ask", "Which colour?", picture, "--model", str(instruct / "model"), "--device", "cpu")
    done = lapilli(*asked, "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_adapter_goes_on_where_it_was_stopped(
    lapilli: Run, checkpoint: str, captions: Path, tmp_path: Path
) -> None:
    given = ("--model.checkpoint", checkpoint, "--data.sources", f'[{{path = "{captions}"}}]')
    given = (*given, "--lora.rank", "4", "--lora.base", "nf4", "--out", str(tmp_path / "run"))
    for steps in ("5", "10"):
        recipe = str(RECIPES / "instruct.toml")
        done = lapilli(
            "train", recipe, *given, "--run.steps", steps, "--optim.schedule", "constant"
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    assert len(losses(tmp_path / "run")) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "recipe key data.sources is empty"),
        (("--optim.rate", "1"), "recipe key optim.rate is unknown"),
        (("--optim.lr",), "recipe option --optim.lr has no value"),
    ],
)
def test_what_a_recipe_lacks_is_named(
    lapilli: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = lapilli("train", str(RECIPES / "align.toml"), "--out", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_plan_costs_nothing_and_says_what_a_run_would(lapilli: Run) -> None:
    recipe = str(RECIPES / "instruct.toml")
    done = lapilli("train", recipe, "--plan", "2", "--model.checkpoint", "pebble")
    assert done.returncode == 0, done.stderr
    assert "2 x A100-80G, ddp, 1 x 2 rows on each GPU, 10 steps" in done.stdout
    assert "2 x H100-80G" in done.stdout
    done = lapilli("train", recipe, "--plan", "3", "--model.checkpoint", "pebble")
    assert done.returncode == 2
    assert "run.gradient_accumulation_steps is 2, and 3 GPUs share its micro-batches" in done.stderr


@pytest.mark.slow
def test_a_run_needs_a_folder(lapilli: Run, tmp_path: Path) -> None:
    recipe = str(RECIPES / "instruct.toml")
    (tmp_path / "file").touch()
    for out in ((), ("--out", str(tmp_path / "file"))):
        done = lapilli("train", recipe, *out)
        assert done.returncode == 2
        assert "--out" in done.stderr


@pytest.mark.slow
def test_a_path_that_leads_nowhere_is_told_before_anything_is_read(
    lapilli: Run, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text((RECIPES / "align.toml").read_text())
    (tmp_path / "train.json").write_text("[]")
    given = ("--out", str(tmp_path / "run"), "--model.checkpoint", "pebble")
    options = ("--data.sources", '[{path = "train.json"}]')
    done = lapilli("train", str(recipe), *given, *options)
    assert done.returncode == 2
    assert f"{tmp_path / 'train.json'} is there: write that, or start in {tmp_path}" in done.stderr
    assert not (tmp_path / "run").exists()
    done = lapilli("train", str(recipe), "--plan", "1", "--model.checkpoint", "./nothing")
    assert "A plan reads config.json of the model" in done.stderr


def test_a_stop_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stop(*_arguments: object, **_options: object) -> None:
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM after step 3 of 9")

    monkeypatch.setattr("lapilli.train.launch.launch", stop)
    with pytest.raises(SystemExit) as told:
        _run(load_recipe(RECIPES / "align.toml"), tmp_path, device="cpu", quiet=True)
    assert told.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM after step 3 of 9\n"


@pytest.mark.slow
def test_a_bad_picture_ends_the_run_or_is_counted(
    checkpoint: str, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As functions, which saves importing torch each time."""
    records = json.loads(captions.read_text())
    records[5]["image"] = "lost.png"
    data = captions.parent / "one_is_lost.json"
    data.write_text(json.dumps(records))
    given = ["--model.checkpoint", checkpoint, "--data.sources", f'[{{path = "{data}"}}]']
    given += ["--run.steps", "3", "--run.plot", "false", "--run.workers", "1"]
    for policy, code in (("error", 2), ("skip", 0)):
        recipe = load_recipe(RECIPES / "align.toml", [*given, "--data.on_bad_sample", policy])
        try:
            with plain_errors():
                _run(recipe, tmp_path / policy, device="cpu", quiet=True)
            found = 0
        except SystemExit as left:
            found = left.code
        said = capsys.readouterr().err
        assert found == code
        assert f"{data}:1 (id '5'): {captions.parent / 'lost.png'} does not exist" in said
        if policy == "skip":
            assert "1 samples could not be read; others stood in for them" in said
        else:
            assert said.count("\n") == 1


@pytest.mark.slow
def test_an_exam_is_printed_at_the_end(
    lapilli: Run, checkpoint: str, captions: Path, tmp_path: Path
) -> None:
    given = ("--model.checkpoint", checkpoint, "--data.sources", f'[{{path = "{captions}"}}]')
    given = (*given, "--lora.rank", "2", "--run.steps", "2", "--out", str(tmp_path / "run"))
    recipe = str(RECIPES / "instruct.toml")
    done = lapilli("train", recipe, *given, "--exam", "2")
    assert done.returncode == 2
    assert "nothing is held out: set data.held_out" in done.stderr
    done = lapilli("train", recipe, *given, "--exam", "2", "--data.held_out", "0.2")
    assert done.returncode == 0, done.stderr
    assert "of 2 held-out answers" in done.stderr
    assert "exact match" in done.stderr


@pytest.mark.slow
def test_a_folder_whose_name_is_no_utf8_is_trained_into_and_asked(
    lapilli: Run, checkpoint: str, captions: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(bytes(tmp_path) + b"/q\xff")
    given = ["--model.checkpoint", checkpoint, "--data.sources", f'[{{path = "{captions}"}}]']
    given += ["--lora.rank", "4", "--optim.schedule", "constant", "--out", f"{odd}/run"]
    for steps in ("1", "2"):  # it goes on
        done = lapilli("train", str(RECIPES / "instruct.toml"), *given, "--run.steps", steps)
        assert done.returncode == 0, done.stderr
    for command in (
        ["ask", "-m", f"{odd}/run/model", "Hello?", "--max-new-tokens", "2"],
        ["export", f"{odd}/run/model", f"{odd}/hf", "--layout", "huggingface"],
        ["ask", "-m", f"{odd}/hf", "Hello?", "--max-new-tokens", "2"],
        ["quantize", f"{odd}/hf", f"{odd}/int4"],
        ["ask", "-m", f"{odd}/int4", "Hello?", "--max-new-tokens", "2"],
    ):
        done = lapilli(*command)
        assert done.returncode == 0, done.stderr
