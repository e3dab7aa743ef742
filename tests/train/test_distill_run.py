"""Runs that imitate pebble, from files: a shorter student, and one of other parts altogether."""

import json

import pytest
import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.source import resolve
from lapilli.config.projector import projector_name
from lapilli.train.build import Joint, build_llava, replace_projector
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import build_task, launch
from lapilli.train.recipe import (
    DataRecipe,
    DistillRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SourceRecipe,
)
from lapilli.train.trainer.model import supervised
from pebble.folder import write_folder
from tests.train import cluster
from tests.train.parts import Parts

PARTS = {"answers", "imitation", "hidden"}


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    """recipe_of(student, stage, **run): of five scenes, one of which is held out."""
    scenes = tmp_path_factory.mktemp("scenes")
    write_folder(scenes, 5, questions=(1, 2))
    source = SourceRecipe(path=str(scenes / "conversations.jsonl"), images=str(scenes / "pictures"))

    def make(student, stage, **run):
        settings = {"steps": 2, "batch_size": 2, "log_every": 1, "evaluate_every": 2}
        return Recipe(
            stage=stage,
            model=ModelRecipe(checkpoint=str(student)),
            distill=DistillRecipe(teacher="pebble", hidden_weight=0.1),
            data=DataRecipe(sources=(source,), template="vicuna_v1", held_out=0.2, pack=True),
            optim=OptimRecipe(lr=1e-3),
            run=RunRecipe(**{**settings, "plot": False, **run}),
        )

    return make


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A student with pebble's vocabulary, and another tower, resolution, width and depth."""
    root = tmp_path_factory.mktemp("stranger")
    parts = Parts(root, torch.float32, rows=1200, vocabulary=resolve("pebble"))
    build_llava(*parts("llama", "siglip"), root / "start", joint=Joint(aspect="square"))
    return root / "start"


def records_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_shorter_student(recipe_of, tmp_path):
    replace_projector("pebble", tmp_path / "llava-short", projector="mlp2x_gelu_pool2x2")
    launch(
        recipe_of(tmp_path / "llava-short", "align", workers=1),
        tmp_path / "run",
        parallel=SINGLE_PROCESS,
    )
    records = records_of(tmp_path / "run")
    assert [set(record) >= PARTS for record in records] == [True, True, False]
    assert "eval_loss" in records[-1]
    loaded = load_checkpoint(tmp_path / "run" / "model", device="cpu", dtype="float32")
    assert projector_name(loaded.config.projector) == "mlp2x_gelu_pool2x2"


@pytest.mark.slow
def test_a_student_of_other_parts(recipe_of, stranger):
    """Its batch and the teacher's differ in everything but what they supervise."""
    task = build_task(recipe_of(stranger, "instruct"), SINGLE_PROCESS)
    batch, _ = task.batch(0, 0)
    spans = [{span.length for span in one.spans} for one in (batch, batch.teacher)]
    sides = [{i.pixel_values.shape[-1] for i in one.media} for one in (batch, batch.teacher)]
    assert (spans, sides) == ([{4}, {64}], [{28}, {128}])
    ours, theirs = (supervised(b.input_ids, b.loss_mask)[1] for b in (batch, batch.teacher))
    assert torch.equal(ours, theirs)
    loss = task.loss(batch)
    assert set(loss.parts) == PARTS
    loss.total.backward()
    assert all(p.grad.any() for n, p in task.model.named_parameters() if "projector.0.w" in n)


@pytest.mark.cluster
def test_two_processes_imitate_as_one(recipe_of, stranger, tmp_path):
    recipe = recipe_of(
        stranger, "instruct", batch_size=1, gradient_accumulation_steps=2, sharding="fsdp"
    )
    launch(recipe, tmp_path / "alone", parallel=SINGLE_PROCESS)
    answers = cluster.together(cluster.run_recipe, 2, tmp_path, recipe)
    assert answers == [None, None]
    expected, found = records_of(tmp_path / "alone"), records_of(tmp_path / "run")
    for one, other in zip(expected, found, strict=True):
        for name in {"loss", "eval_loss", "norm", *PARTS} & set(one):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), name
