"""User-LLM's two stages: an encoder learns alone, then its states are what a language model reads.

The second stage has four forms, which differ in what rests.
"""

from pathlib import Path

import pytest
import torch

from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.load import load_checkpoint
from lapilli.train.build import add_modalities, layout_of
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import build_task, launch
from lapilli.train.next_event import NextEventTask
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
    TrainerRecipe,
)
from lapilli.train.recipe.file import load_recipe
from lapilli.train.trainer.loop import train
from tests.modality.declared import DECLARED, tiny_language_model

LORA = LoraRecipe(rank=2, alpha=4.0)
FORMS = {
    "full": ("instruct", ("user",), None, {"language_model", "encoder", "projector"}),
    "encoder": ("align", ("user",), None, {"encoder", "projector"}),
    "projector": ("align", (), None, {"projector"}),
    "lora": ("instruct", ("user",), LORA, {"lora", "encoder", "projector"}),
}
RECIPES = {
    "full": 'stage = "instruct"\nmodel.tune_encoder = ["user"]',
    "encoder": 'stage = "align"\nmodel.tune_encoder = ["user"]',
    "projector": 'stage = "align"',
    "lora": 'stage = "instruct"\nmodel.tune_encoder = ["user"]\nlora.rank = 2\nlora.alpha = 4.0',
}


def recipe(root: Path, form: str) -> Recipe:
    stage, tuned, lora, _ = FORMS[form]
    return Recipe(
        stage=stage,
        optim=OptimRecipe(lr=3e-3),
        run=RunRecipe(batch_size=4, steps=3, log_every=1, plot=False),
        model=ModelRecipe(checkpoint=str(root / "learned"), tune_encoder=tuned),
        data=DataRecipe(
            sources=(SourceRecipe(path=str(root / "users.json")),), template="vicuna_v1"
        ),
        lora=lora,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A checkpoint whose encoder of events has learned, and questions about users."""
    root = tmp_path_factory.mktemp("users")
    plain = tiny_language_model(root / "plain")
    add_modalities(str(plain), root / "fresh", {"user": {**DECLARED["user"], "dropout": 0.1}})
    loaded = load_checkpoint(root / "fresh", device="cpu", dtype="float32")
    histories = [{"film": [1 + (s + i) % 9 for i in range(6)]} for s in range(8)]
    run = RunRecipe(batch_size=4, steps=5, plot=False)
    first = TrainerRecipe(stage="events", optim=OptimRecipe(lr=0.01), run=run)
    task = NextEventTask(loaded.model.modality("user"), histories, run)
    train(task, first, root / "run")
    save_loaded(root / "learned", loaded, layout=layout_of(loaded.config))
    rows = [
        f'{{"user": {{"film": [{s + 1}, 2]}}, "conversations": [{{"from": "human", "value": '
        f'"<user>\\nWhat next?"}}, {{"from": "gpt", "value": "{("red", "blue")[s % 2]}"}}]}}'
        for s in range(8)
    ]
    (root / "users.json").write_text(f"[{', '.join(rows)}]")
    return root


def part_of(name: str) -> str:
    if "lora_" in name:
        return "lora"
    if name.startswith("language_model."):
        return "language_model"
    return name.split(".")[2]


def test_an_encoder_that_learned_alone_is_saved(root):
    fresh, learned = (load_checkpoint(root / name, device="cpu") for name in ("fresh", "learned"))
    assert learned.config.modalities == fresh.config.modalities
    before, after = fresh.model.state_dict(), learned.model.state_dict()
    moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"encoder"}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_each_form_changes_its_parts_and_is_read_back(root, form, tmp_path):
    task = launch(recipe(root, form), tmp_path / "run", parallel=SINGLE_PROCESS)
    before = load_checkpoint(root / "learned", device="cpu", dtype="float32").model.state_dict()
    trained = dict(task.model.vlm.named_parameters())
    moved = {
        part_of(name)
        for name, value in trained.items()
        if part_of(name) == "lora" or not torch.equal(value, before[name])
    }
    assert moved == FORMS[form][3]
    again = load_checkpoint(
        tmp_path / "run" / "model", device="cpu", dtype="float32", merge_lora=False
    ).model.state_dict()
    # Files of the tiny model are float32, so nothing is rounded on the way.
    assert all(torch.equal(again[name], value) for name, value in trained.items())


@pytest.mark.parametrize("form", FORMS)
def test_a_form_in_a_file_is_what_the_guide_says(root, form, tmp_path):
    rest = '\n[data]\nsources = [{path = "%s"}]\n[optim]\nlr = 1e-3\n[run]\nbatch_size = 2\n'
    keys = RECIPES[form].replace("\n", f'\nmodel.checkpoint = "{root / "learned"}"\n', 1)
    if "\n" not in RECIPES[form]:
        keys += f'\nmodel.checkpoint = "{root / "learned"}"'
    (tmp_path / "recipe.toml").write_text(keys + rest % (root / "users.json"))
    task = build_task(load_recipe(tmp_path / "recipe.toml"), SINGLE_PROCESS)
    model = task.model.vlm
    learning = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert learning == FORMS[form][3]
    assert model.modality("user").encoder.training is ("encoder" in learning)
