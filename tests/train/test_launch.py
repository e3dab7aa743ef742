"""A recipe's model and data as a task, and a run from its recipe to its folder, in this process."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lapilli.checkpoint.load import load_checkpoint
from lapilli.config.model import RopeScaling
from lapilli.errors import ConfigError, DataError
from lapilli.lora import adapter_tensors
from lapilli.train.build import Joint, build_llava
from lapilli.train.distributed import SINGLE_PROCESS, joined
from lapilli.train.launch import TrainingTask, build_task, check_packing, launch, locked
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
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.task import (
    Task,
    TrainingError,
)
from tests.train.parts import Parts


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Samples with no, one and two pictures, over several turns."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for i in range(8):
        names = [f"{i}_{n}.png" for n in range(i % 3)]
        for name in names:
            Image.new("RGB", (30 + i, 40), (20 * i, 90, 200)).save(folder / name)
        turns = []
        for n in range(2):
            shown = "\n<image>" * (len(names) if n == i % 2 else 0)
            turns.append({"from": "human", "value": f"What about {i}?{shown}"})
            turns.append({"from": "gpt", "value": f"It is {i} of {n}."})
        records.append({"id": f"s{i}", "image": names, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def build(checkpoint, file, *, run=None, model=None, lora=None, **data):
    return build_task(
        Recipe(
            stage="instruct",
            optim=OptimRecipe(lr=1e-3),
            run=RunRecipe(**{"batch_size": 4, **(run or {})}),
            model=ModelRecipe(checkpoint=checkpoint, **(model or {})),
            data=DataRecipe(sources=(SourceRecipe(path=str(file)),) if file else (), **data),
            lora=lora,
        ),
        SINGLE_PROCESS,
    )


def test_a_training_task_is_a_task_of_the_loop(checkpoint, file):
    task = build(checkpoint, file)
    batch, count = task.batch(0, 0)
    assert isinstance(task, Task)
    assert task.num_samples > 0
    assert task.fingerprint()["stage"] == task.recipe.stage
    assert batch.ids
    assert task.num_samples == 8
    assert count == batch.num_valid > 0
    assert task.evaluate() == {}
    again, _ = task.batch(0, 0)
    assert again.ids == batch.ids
    assert torch.equal(again.input_ids, batch.input_ids)
    other, _ = task.batch(1, 0)
    assert sorted(batch.ids + other.ids) == [f"s{i}" for i in range(8)]


@pytest.mark.slow
def test_packed_batches_have_the_loss_of_padded_ones(checkpoint, file):
    losses = []
    for packed in (False, True):
        task = build(checkpoint, file, pack=packed, max_length=512)
        batch, count = task.batch(0, 0)
        assert batch.is_packed is packed
        losses.append(task.loss(batch).total.detach() / count)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("apart", ["held_out", "evaluation"])
def test_samples_are_placed_and_cut_as_the_recipe_says(checkpoint, file, apart):
    """Those that are learned from, and those that are evaluated."""
    given = {"held_out": 0.4, "evaluation": (SourceRecipe(path=str(file)),)}[apart]

    def prompts(**data):
        task = build(checkpoint, file, **{apart: given}, **data)
        return [
            [samples.sample(i).prompt for i in range(len(samples))]
            for samples in (task.samples, task.held_out)
        ]

    usual, written = prompts(), prompts(placement="written")
    limit = min(max(map(len, rows)) for rows in usual) - 1
    for front, back, cut in zip(usual, written, prompts(max_length=limit), strict=True):
        starts, later = ([s.start for row in rows for s in row.spans] for rows in (front, back))
        assert starts
        assert all(one < other for one, other in zip(starts, later, strict=True))
        assert [row.input_ids for row in cut] == [row.input_ids[:limit] for row in front]
        assert max(map(len, cut)) == limit


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [False, True])
def test_layers_are_computed_twice_and_compiled_as_the_recipe_says(
    checkpoint, file, wanted, monkeypatch
):
    compiled, calls = [], Counter()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **_: compiled.append(layer))
    run = {"gradient_checkpointing": wanted, "compile": wanted}
    task = build(checkpoint, file, run=run, model={"tune_tower": True})
    tower = task.loaded.model.modality("image").vision_tower
    layers = [
        *task.loaded.model.language_model.model.layers,
        *tower.vision_model.encoder.layers[: tower.num_used_layers],
    ]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.update([layer]))
    batch, _ = task.batch(0, 0)
    task.loss(batch).total.backward()
    assert calls == dict.fromkeys(layers, 2 if wanted else 1)
    assert (set(layers) <= set(compiled)) is bool(compiled) is wanted


def test_rows_whose_positions_depend_on_their_length_are_not_packed(checkpoint, file):
    loaded = build(checkpoint, file).loaded
    scaling = RopeScaling(kind="dynamic", factor=2.0)
    text = replace(loaded.config.text, rope_scaling=scaling, max_positions=64)
    loaded = replace(loaded, config=replace(loaded.config, text=text))
    check_packing(loaded, 64)
    with pytest.raises(ConfigError, match="positions grow with the row beyond 64"):
        check_packing(loaded, 65)


@pytest.mark.slow
def test_held_out_samples_are_evaluated_and_not_learned_from(checkpoint, file):
    task = build(checkpoint, file, held_out=0.25)
    assert task.num_samples == 6
    assert len(task.held_out) == 2
    learned = {name for step in range(3) for name in task.batch(step, 0)[0].ids}
    kept = {task.held_out.sample(i).id for i in range(2)}
    assert not learned & kept
    task.model.eval()
    with torch.no_grad():
        found = task.evaluate()["eval_loss"]
        rows = [task.held_out.sample(i) for i in range(2)]
        batch = task._collate(rows)
        expected = task.loss(batch).total / batch.num_valid
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_a_file_of_its_own_may_be_evaluated(checkpoint, file):
    task = build(checkpoint, file, evaluation=(SourceRecipe(path=str(file)),))
    assert task.num_samples == len(task.held_out) == 8


def test_what_cannot_be_read_is_counted_where_it_is_learned_from(checkpoint, file, tmp_path):
    records = json.loads(file.read_text())
    records[1]["image"] = ["missing.png"]
    (tmp_path / "bad.json").write_text(json.dumps(records))
    for name in file.parent.glob("*.png"):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    task = build(checkpoint, tmp_path / "bad.json", on_bad_sample="skip", run={"batch_size": 8})
    batch, _ = task.batch(0, 0)
    assert task.skipped == []
    with torch.no_grad():
        task.loss(batch)
    assert len(task.skipped) == 1
    assert "missing.png" in task.skipped[0]


@pytest.mark.slow
def test_what_cannot_be_read_is_left_out_of_an_evaluation_and_counted(checkpoint, file, tmp_path):
    shutil.copytree(file.parent, tmp_path / "data")
    (tmp_path / "data" / "4_0.png").unlink()
    lost = (SourceRecipe(path=str(tmp_path / "data" / "train.json")),)
    records = json.loads(file.read_text())
    whole = [record for record in records if "4_0.png" not in record.get("image", [])]
    (tmp_path / "data" / "whole.json").write_text(json.dumps(whole))
    rest = (SourceRecipe(path=str(tmp_path / "data" / "whole.json")),)
    found = []
    for sources in (lost, rest):
        for size in (1, 3):
            task = build(
                checkpoint, file, evaluation=sources, on_bad_sample="skip", run={"batch_size": size}
            )
            with torch.no_grad():
                found.append(task.evaluate())
    assert len(whole) == len(records) - 1
    assert [metrics.get("eval_skipped") for metrics in found] == [1, 1, None, None]
    losses = [metrics["eval_loss"] for metrics in found]
    assert losses == pytest.approx([losses[-1]] * 4, rel=1e-5)


def test_a_bad_held_out_sample_ends_a_run_before_its_first_step(checkpoint, file, tmp_path):
    shutil.copytree(file.parent, tmp_path / "data")
    (tmp_path / "data" / "4_0.png").unlink()
    lost = (SourceRecipe(path=str(tmp_path / "data" / "train.json")),)
    with pytest.raises(DataError, match=r"4_0\.png does not exist"):
        build(checkpoint, file, evaluation=lost)
    with pytest.raises(
        ConfigError, match="evaluate_every would change nothing: nothing is held out"
    ):
        build(checkpoint, file, run={"keep_best": True, "evaluate_every": 2})


@pytest.mark.slow
def test_the_log_counts_what_could_not_be_read_over_a_stop(checkpoint, file, tmp_path):
    shutil.copytree(file.parent, tmp_path / "data")
    (tmp_path / "data" / "4_0.png").unlink()
    for steps in (3, 5):
        task = build(
            checkpoint,
            tmp_path / "data" / "train.json",
            on_bad_sample="skip",
            run={"batch_size": 8, "steps": steps, "log_every": 1, "plot": False},
        )
        train(task, task.recipe, tmp_path / "run")
        assert all("4_0.png" in why for why in task.skipped)
    counts = [record["skipped"] for record in RunLog(tmp_path / "run").records()]
    assert counts == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_an_adapter_learns_beside_a_packed_base(checkpoint, file):
    task = build(checkpoint, file, lora=LoraRecipe(rank=2, dropout=0.1, base="nf4"))
    task.model.train()
    batch, _ = task.batch(0, 0)
    task.loss(batch).total.backward()
    learned = {n: p.grad for n, p in task.model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in learned)
    assert all(gradient is not None for gradient in learned.values())
    assert all(g.abs().sum() > 0 for n, g in learned.items() if "lora_B" in n or "projector" in n)


def test_no_data_is_refused(checkpoint):
    with pytest.raises(ConfigError, match=r"data\.sources is empty: name a file"):
        build(checkpoint, None)


@pytest.mark.slow
def test_a_run_with_another_seed_or_other_data_is_refused(checkpoint, file, tmp_path):
    run = {"steps": 1, "plot": False, "batch_size": 2}
    first = build(checkpoint, file, run=run)
    train(first, first.recipe, tmp_path / "run")
    other = build(checkpoint, file, run={**run, "seed": 1})
    with pytest.raises(TrainingError, match=r"run.seed: the state says 0, the recipe 1"):
        train(other, other.recipe, tmp_path / "run")
    folder = tmp_path / "data"
    shutil.copytree(file.parent, folder)
    again = build(checkpoint, folder / file.name, run={**run, "steps": 2})
    train(again, again.recipe, tmp_path / "run")
    records = json.loads(file.read_text())
    (folder / file.name).write_text(json.dumps(records[::-1]))
    changed = build(checkpoint, folder / file.name, run=run)
    with pytest.raises(TrainingError, match=r"data.sources\[0\].content: the state says 'sha256:"):
        train(changed, changed.recipe, tmp_path / "run")


def test_the_samples_of_a_micro_batch_are_named_before_it_is_made(checkpoint, file):
    task = build(checkpoint, file)
    ids = task.batch(1, 0)[0].ids
    assert task.names(1, 0) == [f"{file}:1 (id {name!r})" for name in ids]


@pytest.mark.slow
def test_a_fresh_adapter_is_drawn_from_the_seed(checkpoint, file):
    """Whatever else was drawn before."""
    drawn = []
    for seed in (0, 0, 1):
        torch.randn(5)
        task = build(checkpoint, file, lora=LoraRecipe(rank=2), run={"seed": seed})
        halves = [p.detach() for n, p in task.model.named_parameters() if "lora_A" in n]
        drawn.append(torch.cat([half.flatten() for half in halves]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


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
