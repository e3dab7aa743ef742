"""A run from its recipe to its folder, in this process."""

import json

import pytest
import torch
from PIL import Image

from lapilli.checkpoint.load import load_checkpoint
from lapilli.errors import DataError
from lapilli.lora import adapter_tensors
from lapilli.train.build import build_llava
from lapilli.train.launch import launch
from lapilli.train.parallel import ALONE, joined
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)
from lapilli.train.task import TrainingTask
from tests.train.parts import Parts


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("launch")
    build_llava(*Parts(root, torch.float32)("llama", "clip"), root / "start")
    return root / "start"


@pytest.fixture
def recipe_of(start, tmp_path):
    """recipe_of(stage, run=..., **more): two steps on four samples."""
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A stone."}]
    samples = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(samples))

    def make(stage="instruct", *, run=None, **more):
        settings = {"batch_size": 1, "steps": 2, "save_every": 1, "plot": False, **(run or {})}
        return Recipe(
            stage=stage,
            optim=OptimRecipe(lr=1e-2),
            run=RunRecipe(**settings),
            model=ModelRecipe(checkpoint=str(start)),
            data=DataRecipe(sources=(SourceRecipe(path=str(tmp_path / "train.json")),)),
            **more,
        )

    return make


def test_one_process_takes_a_recipe_for_many(recipe_of, tmp_path):
    """run.sharding = "fsdp" of one process is the whole model."""
    saved = []
    for sharding in ("ddp", "fsdp"):
        recipe = recipe_of(run={"sharding": sharding, "gradient_checkpointing": True})
        with joined(None, sharding=sharding, device="cpu") as team:
            launch(recipe, tmp_path / sharding, team=team)
        saved.append((tmp_path / sharding / "model" / "model.safetensors").read_bytes())
    assert saved[0] == saved[1]


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FILES = {
    "align": {"config.json", "mm_projector.bin"},
    "instruct": {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "non_lora_trainables.bin",
    },
}


@pytest.mark.parametrize("stage", FILES)
def test_every_checkpoint_has_the_files_of_the_end(recipe_of, tmp_path, monkeypatch, stage):
    """The original's own intermediate ones lack non_lora_trainables.bin and the tokenizer."""
    make = TrainingTask.batch

    def first_alone(self, step, micro):
        if step:
            raise DataError("the disk with the data is gone")
        return make(self, step, micro)

    monkeypatch.setattr(TrainingTask, "batch", first_alone)
    lora = LoraRecipe(rank=2) if stage == "instruct" else None
    with pytest.raises(DataError, match="is gone"):
        launch(recipe_of(stage, lora=lora), tmp_path / "run", team=ALONE)
    model = tmp_path / "run" / "model"
    assert {path.name for path in model.iterdir()} >= FILES[stage] | TOKENIZER
    loaded = load_checkpoint(model, device="cpu", dtype="float32", merge_lora=False)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"]
    learned = {name: t for name, t in loaded.model.state_dict().items() if "projector" in name}
    learned |= adapter_tensors(loaded.model)
    assert len(learned) == (4 if stage == "align" else 4 + 2 * 14)
    for name, tensor in learned.items():
        assert torch.equal(tensor, state[f"vlm.{name}"]), name
