"""A card says what was trained on what, in a header that the hub can read."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lapilli
from lapilli.checkpoint.load import load_checkpoint
from lapilli.errors import MissingFileError
from lapilli.train.build import build_llava
from lapilli.train.card import data_files, model_card
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import launch
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SaveRecipe,
    SourceRecipe,
)
from lapilli.train.recipe.file import load_recipe, recipe_text
from lapilli.train.results import Results
from tests.integration.oracle import picture
from tests.train.parts import Parts
from tests.train.recipe.test_recipes import FILES, NAMES


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    build_llava(*Parts(root)("llama", "clip"), root / "my-start")
    (root / "my-start" / "README.md").write_text("---\nlicense: llama2\n---\n# Start\n")
    return root / "my-start"


@pytest.fixture
def recipe(start, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1}]))
    return Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=2e-5),
        run=RunRecipe(batch_size=4, steps=3),
        model=ModelRecipe(checkpoint=str(start)),
        data=DataRecipe(sources=(SourceRecipe(path=str(tmp_path / "train.json")),)),
    )


def results_of(recipe, start):
    loaded = load_checkpoint(start, device="cpu", dtype="float32")
    return Results.of(loaded, recipe)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    records = [
        {"step": 1, "loss": 4.0},
        {"step": 1, "eval_loss": 3.5},
        {"step": 2, "loss": 3.0},
        {"step": 2, "eval_loss": 2.5},
        {"step": 3, "loss": 2.0},
        {"step": 3, "eval_loss": 2.75, "eval_accuracy": 0.5},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "loss.png").write_bytes(b"\x89PNG")
    return folder


def front_of(files):
    _, front, body = files["README.md"].split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_of_a_run(recipe, start, run, tmp_path):
    files = model_card(results_of(recipe, start), run)
    assert set(files) == {"README.md", "loss.png", "recipe.toml"}
    front, body = front_of(files)
    assert front == {
        "license": "llama2",
        "library_name": "lapilli",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "lapilli"],
    }
    assert "It started from `my-start`" in body
    assert str(tmp_path) not in body.split("## Recipe")[0]
    assert "| mean loss of the last tenth | 2.0000 |" in body
    assert "lowest eval_loss was 2.5000, after step 2" in body
    assert "| eval_accuracy | 0.5000 |" in body
    digest = hashlib.sha256((tmp_path / "train.json").read_bytes()).hexdigest()
    assert f"| train.json | 11 | sha256:{digest} |" in body
    assert "![loss over steps](loss.png)" in body
    assert 'lapilli ask "What is in this picture?" picture.png --model FOLDER' in body
    assert "`vicuna_v1`" in body


def test_the_recipe_in_it_is_the_recipe(recipe, start, run, tmp_path):
    files = model_card(results_of(recipe, start), run)
    (tmp_path / "again.toml").write_text(files["recipe.toml"])
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_recipe_is_written_and_read_back(path, tmp_path, defaults):
    recipe = load_recipe(path)
    (tmp_path / "again.toml").write_text(recipe_text(recipe, defaults=defaults))
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_the_card_shows_what_is_no_default(recipe, start, run, tmp_path):
    recipe = replace(recipe, lora=LoraRecipe(), optim=OptimRecipe(lr=2e-5, betas=(0.9, 0.999)))
    text = model_card(results_of(recipe, start), run)["README.md"]
    shown = text.partition("```toml\n")[2].partition("```")[0]
    assert shown == (
        'stage = "instruct"\n\n'
        "[optim]\nlr = 2e-05\nbetas = [0.9, 0.999]\n\n"
        "[run]\nbatch_size = 4\nsteps = 3\n\n"
        f'[model]\ncheckpoint = "{start}"\n\n'
        f'[data]\nsources = [{{ path = "{tmp_path / "train.json"}" }}]\n\n'
        "[lora]\n"
    )
    (tmp_path / "again.toml").write_text(shown)
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_a_hub_id_is_the_base(recipe, start, run):
    lora = replace(recipe, lora=LoraRecipe())
    results = results_of(lora, start)
    hub = replace(lora, model=ModelRecipe(checkpoint="owner/llava-7b@main"))
    front, _ = front_of(model_card(replace(results, recipe=hub), run))
    assert front["base_model"] == "owner/llava-7b"
    assert front["base_model_relation"] == "adapter"
    assert "lora" in front["tags"]
    merged = replace(hub, save=SaveRecipe(merge=True, layout="huggingface"))
    front, body = front_of(model_card(replace(results, recipe=merged), run))
    assert front["base_model_relation"] == "finetune"
    assert front["library_name"] == "transformers"
    assert "whose LoRA is folded in" in body
    assert '`AutoModelForImageTextToText.from_pretrained("FOLDER")`' in body
    apart = replace(merged, save=SaveRecipe(layout="huggingface"))
    _, body = front_of(model_card(replace(results, recipe=apart), run))
    assert '`PeftModel.from_pretrained(model, "FOLDER")`' in body


def test_a_run_without_log_has_a_card(recipe, start, tmp_path):
    files = model_card(results_of(recipe, start), tmp_path / "nothing")
    assert set(files) == {"README.md", "recipe.toml"}
    assert "## Training" not in files["README.md"]


def test_another_content_is_another_digest(recipe, tmp_path):
    file = tmp_path / "train.json"
    [before] = data_files(recipe)
    file.write_text(file.read_text().replace("1", "2"))
    [after] = data_files(recipe)
    assert before.num_bytes == after.num_bytes
    assert before.digest != after.digest


@pytest.mark.slow
def test_a_run_ends_with_results_and_their_card(start, tmp_path):
    picture(40, 30, 1).save(tmp_path / "a.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A stone."},
    ]
    samples = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(samples))
    recipe = Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=1e-2),
        run=RunRecipe(batch_size=1, steps=3, save_every=2, log_every=1),
        model=ModelRecipe(checkpoint=str(start)),
        data=DataRecipe(sources=(SourceRecipe(path=str(tmp_path / "train.json")),), held_out=0.25),
        lora=LoraRecipe(rank=2, alpha=4.0),
    )
    run = tmp_path / "my-run"
    launch(recipe, run, parallel=SINGLE_PROCESS)
    front, body = front_of({"README.md": (run / "model" / "README.md").read_text()})
    assert front["tags"] == ["llava", "lapilli", "lora", "peft"]
    assert "| steps | 3 |" in body
    assert "| samples | 3, and 1 held out |" in body
    saved = load_file(run / "model" / "adapter_model.safetensors")
    saved |= torch.load(run / "model" / "non_lora_trainables.bin", weights_only=True)
    learned = sum(tensor.numel() for tensor in saved.values())
    assert f"| trainable parameters | {learned:,} |" in body
    assert (
        f"| made with | lapilli {lapilli.__version__}, torch {torch.__version__}, 1 x cpu |" in body
    )
    assert (run / "model" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(run / "model" / "recipe.toml") == recipe
    with pytest.raises(MissingFileError, match=rf"did you mean {run / 'model'}\?"):
        lapilli.load(str(run))
    chat = lapilli.load(str(run / "model"), device="cpu", dtype="float32")
    assert isinstance(chat.ask("What?", str(tmp_path / "a.png"), max_new_tokens=2), str)
