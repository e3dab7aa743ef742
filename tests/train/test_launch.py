"""A run from its recipe to its folder, in this process."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lapilli.checkpoint.load import load_checkpoint
from lapilli.errors import ConfigError, DataError
from lapilli.lora import adapter_tensors
from lapilli.train.build import Joint, build_llava
from lapilli.train.distributed import SINGLE_PROCESS, joined
from lapilli.train.launch import launch, locked
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    NoiseRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)
from lapilli.train.task import TrainingTask
from tests.train.parts import Parts


@pytest.fixture(scope="module", params=["pad", "anyres"])
def start(request, tmp_path_factory):
    """A tiny LLaVA that sees a picture as one tile, or as several."""
    root = tmp_path_factory.mktemp("launch")
    parts = Parts(root, torch.float32)("llama", "clip")
    build_llava(*parts, root / "start", joint=Joint(aspect=request.param))
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


@pytest.mark.slow
def test_one_process_takes_a_recipe_for_many(recipe_of, tmp_path):
    """run.sharding = "fsdp" of one process is the whole model."""
    saved = []
    for sharding in ("ddp", "fsdp"):
        recipe = recipe_of(run={"sharding": sharding, "gradient_checkpointing": True})
        with joined(None, sharding=sharding, device="cpu") as parallel:
            launch(recipe, tmp_path / sharding, parallel=parallel)
        saved.append((tmp_path / sharding / "model" / "model.safetensors").read_bytes())
    assert saved[0] == saved[1]


@pytest.mark.slow
def test_results_replace_those_of_their_own_run_alone(recipe_of, start, tmp_path):
    taken = tmp_path / "taken"
    (taken / "model").mkdir(parents=True)
    (taken / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no state of a run beside it to go on from"):
        launch(recipe_of(), taken, parallel=SINGLE_PROCESS)
    assert [path.name for path in taken.rglob("*")] == ["model", "thesis.txt"]
    shutil.copytree(start, tmp_path / "own" / "model")
    for key in ("checkpoint", "adapter", "projector"):
        for given in (tmp_path / "own", tmp_path / "own" / "model"):
            recipe = recipe_of()
            recipe = replace(recipe, model=replace(recipe.model, **{key: str(given)}))
            with pytest.raises(ConfigError, match="which it begins with: give another folder"):
                launch(recipe, tmp_path / "own", parallel=SINGLE_PROCESS)
    launch(recipe_of("align"), tmp_path / "run", parallel=SINGLE_PROCESS)
    launch(
        recipe_of("align", run={"steps": 3}), tmp_path / "run", parallel=SINGLE_PROCESS
    )  # it goes on
    with pytest.raises(ConfigError, match="has done 3 steps, and this recipe has 2"):
        launch(recipe_of("align"), tmp_path / "run", parallel=SINGLE_PROCESS)


def test_a_folder_has_one_run_at_a_time(recipe_of, tmp_path):
    folder = tmp_path / "run"
    with locked(folder), pytest.raises(ConfigError, match=r"another run trains into .*run: wait"):
        launch(recipe_of(), folder, parallel=SINGLE_PROCESS)
    assert not (folder / "log.jsonl").exists()
    launch(recipe_of(), folder, parallel=SINGLE_PROCESS)
    assert (folder / "model" / "config.json").exists()


def losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraRecipe(rank=2)])
def test_bfloat16_has_the_losses_of_float32(recipe_of, tmp_path, lora):
    for precision in ("float32", "bfloat16"):
        recipe = recipe_of(run={"precision": precision, "log_every": 1}, lora=lora)
        launch(recipe, tmp_path / precision, parallel=SINGLE_PROCESS)
    exact, found = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    assert found == pytest.approx(exact, rel=4e-3)  # a loss summed in bfloat16 is 5e-3 away
    assert found != pytest.approx(exact, rel=1e-5)


@pytest.mark.slow
def test_every_part_learns_from_packed_rows(recipe_of, start, tmp_path):
    """With noise, averages and a rate of its own for the tower."""
    recipe = recipe_of(noise=NoiseRecipe(alpha=5.0), run={"batch_size": 2})
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, tower_lr=1e-3, ema=0.5, schedule="constant"),
        model=replace(recipe.model, tune_tower=True),
        data=replace(recipe.data, pack=True),
    )
    task = launch(recipe, tmp_path / "run", parallel=SINGLE_PROCESS)
    batch, _ = task.batch(0, 0)
    tiles = 5 if task.loaded.config.has_newline else 1
    assert batch.is_packed
    assert [len(item.pixel_values) for item in batch.media] == [tiles] * 2
    before, after = (
        load_checkpoint(path, device="cpu", dtype="float32").model.state_dict()
        for path in (start, tmp_path / "run" / "model")
    )
    moved = {name: (after[name] - t).abs().max().item() for name, t in before.items()}
    parts = {"language_model": 1e-2, "projector": 1e-2, "vision_tower": 1e-3}
    if tiles > 1:
        parts["image_newline"] = 1e-2
    for part, rate in parts.items():
        assert rate < max(moved[name] for name in moved if part in name) < 2 * rate, part


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


MAKE = TrainingTask.batch


def first_alone(self, step, micro):
    """The batches of the first step, and no more."""
    if step:
        raise DataError("the disk with the data is gone")
    return MAKE(self, step, micro)


@pytest.mark.slow
@pytest.mark.parametrize("stage", FILES)
def test_every_checkpoint_has_the_files_of_the_end(recipe_of, tmp_path, monkeypatch, stage):
    """The original's own intermediate ones lack non_lora_trainables.bin and the tokenizer."""
    monkeypatch.setattr(TrainingTask, "batch", first_alone)
    lora = LoraRecipe(rank=2) if stage == "instruct" else None
    with pytest.raises(DataError, match="is gone"):
        launch(recipe_of(stage, lora=lora), tmp_path / "run", parallel=SINGLE_PROCESS)
    model = tmp_path / "run" / "model"
    assert {path.name for path in model.iterdir()} >= FILES[stage] | TOKENIZER
    loaded = load_checkpoint(model, device="cpu", dtype="float32", merge_lora=False)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"]
    learned = {name: t for name, t in loaded.model.state_dict().items() if "projector" in name}
    tiled = loaded.config.has_newline
    learned |= {name: t for name, t in loaded.model.state_dict().items() if "newline" in name}
    learned |= adapter_tensors(loaded.model)
    assert len(learned) == 4 + tiled + (0 if stage == "align" else 2 * 14)
    for name, tensor in learned.items():
        assert torch.equal(tensor, state[f"vlm.{name}"]), name


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "rel"), [("float32", 5e-3), ("bfloat16", 2e-2)])
def test_a_gpu_has_the_losses_of_the_cpu(recipe_of, tmp_path, precision, rel):
    recipe = recipe_of(run={"steps": 3, "precision": precision, "log_every": 1})
    for device in ("cpu", "cuda"):
        with joined(None, device=device) as parallel:
            launch(recipe, tmp_path / device, parallel=parallel)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=rel)


@pytest.mark.gpu
@needs_gpu
def test_a_stopped_run_goes_on_with_the_same_bits_on_a_gpu(recipe_of, tmp_path, monkeypatch):
    """Rows are short: torch's attention sums long ones backwards in any order."""
    recipe = recipe_of(run={"steps": 3, "log_every": 1})
    recipe = replace(recipe, data=replace(recipe.data, template="plain"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with joined(None, device="cuda") as parallel:
        launch(recipe, whole, parallel=parallel)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingTask, "batch", first_alone)
            with pytest.raises(DataError, match="is gone"):
                launch(recipe, parts, parallel=parallel)
        launch(recipe, parts, parallel=parallel)
    assert losses(parts) == losses(whole)
    saved = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert saved[0] == saved[1]
