"""The exam at the end of a run: the saved results answer what was held out."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import lapilli
from lapilli.train.build import build_llava
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
from lapilli.train.results import Graded, answers_of, exam_record
from lapilli.train.trainer.metrics import RunLog
from tests.train import cluster
from tests.train.parts import Parts


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    root = tmp_path_factory.mktemp("exam")
    build_llava(*Parts(root, torch.float32)("llama", "clip"), root / "start")
    return root / "start"


@pytest.fixture
def recipe_of(start, tmp_path):
    """recipe_of(stage, run=..., **more): a few steps on samples of two turns that all agree."""
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "a.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A b"},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "No"},
    ]
    samples = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(8)]
    (tmp_path / "train.json").write_text(json.dumps(samples))

    def make(stage="instruct", *, run=None, lr=1e-2, **more):
        settings = {"batch_size": 2, "steps": 2, "exam": 2, "plot": False, **(run or {})}
        source = SourceRecipe(path=str(tmp_path / "train.json"))
        return Recipe(
            stage=stage,
            optim=OptimRecipe(lr=lr),
            run=RunRecipe(**settings),
            model=ModelRecipe(checkpoint=str(start)),
            data=DataRecipe(sources=(source,), held_out=0.25),
            **more,
        )

    return make


def exams(folder):
    return [record for record in RunLog(folder).records() if "exact_match" in record]


def graded(folder):
    return [json.loads(line) for line in (folder / "exam.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_overfitted_model_answers_its_held_out_samples(recipe_of, tmp_path):
    """And both turns of every sample are asked, with the words that `ask` gives."""
    folder = tmp_path / "run"
    launch(recipe_of(run={"steps": 40}), folder, parallel=SINGLE_PROCESS)
    assert exams(folder) == [{"step": 40, "exact_match": 1.0, "equal": 4, "answers": 4}]
    assert [one["reference"] for one in graded(folder)] == ["A b", "No"] * 2
    assert lapilli.load(str(folder / "model")).ask("What?", str(tmp_path / "a.png")) == "A b"
    card = (folder / "model" / "README.md").read_text()
    assert "| exact_match | 1 |" in card
    assert "| answers | 4 |" in card


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"lora": LoraRecipe(rank=2)},
        {"lora": LoraRecipe(rank=2), "save": SaveRecipe(merge=True)},
        {"save": SaveRecipe(layout="huggingface")},
        {"run": {"precision": "bfloat16"}, "lora": LoraRecipe(rank=2, base="nf4")},
    ],
)
def test_every_form_of_results_is_examined(recipe_of, tmp_path, more):
    folder = tmp_path / "run"
    launch(recipe_of(**more), folder, parallel=SINGLE_PROCESS)
    (record,) = exams(folder)
    rows = graded(folder)
    assert record["answers"] == len(rows) >= 2
    assert record["equal"] == sum(row["equal"] for row in rows)
    assert "exact_match" in (folder / "model" / "README.md").read_text()
    assert not list((folder / "model").glob("*.part"))


@pytest.mark.slow
def test_a_projector_is_examined_on_captions(recipe_of, tmp_path):
    recipe = recipe_of("align")
    samples = json.loads((tmp_path / "train.json").read_text())
    captions = [{**one, "conversations": one["conversations"][:2]} for one in samples]
    (tmp_path / "train.json").write_text(json.dumps(captions))
    launch(recipe, tmp_path / "run", parallel=SINGLE_PROCESS)
    assert exams(tmp_path / "run")[0]["answers"] == 2
    assert [one["reference"] for one in graded(tmp_path / "run")] == ["A b"] * 2


@pytest.mark.slow
def test_a_run_that_goes_on_is_examined_again(recipe_of, tmp_path):
    folder = tmp_path / "run"
    recipe = recipe_of(lora=LoraRecipe(rank=2))
    for steps in (2, 2, 3):  # the second time nothing is left to do
        launch(
            replace(recipe, run=replace(recipe.run, steps=steps)), folder, parallel=SINGLE_PROCESS
        )
    assert [record["step"] for record in exams(folder)] == [2, 3]


@pytest.mark.cluster
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_the_main_process_alone_runs_the_exam(recipe_of, tmp_path, sharding):
    recipe = recipe_of(run={"gradient_accumulation_steps": 2, "sharding": sharding})
    for answer in cluster.together(cluster.run_recipe, 2, tmp_path / "run", recipe):
        assert not isinstance(answer, BaseException), answer
    (record,) = exams(tmp_path / "run" / "run")
    assert record["answers"] == 4
    assert "exact_match" in (tmp_path / "run" / "run" / "model" / "README.md").read_text()


@pytest.mark.slow
def test_a_skipped_sample_is_not_asked(recipe_of, tmp_path):
    recipe = recipe_of(run={"exam": 8})
    samples = json.loads((tmp_path / "train.json").read_text())
    exam = [*samples[:1], {**samples[1], "image": "gone.png"}]
    (tmp_path / "exam.json").write_text(json.dumps(exam))
    source = SourceRecipe(path=str(tmp_path / "exam.json"))
    data = DataRecipe(sources=recipe.data.sources, evaluation=(source,), on_bad_sample="skip")
    launch(replace(recipe, data=data), tmp_path / "run", parallel=SINGLE_PROCESS)
    assert exams(tmp_path / "run")[0]["answers"] == 2


def test_answers_of_a_loss_mask():
    assert answers_of([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert answers_of([]) == []


def test_white_space_around_an_answer_does_not_count():
    found = exam_record(3, [Graded("a", "Box 1.", "Box 1."), Graded("b", "Box 1.", "box 1.")])
    assert found == {"step": 3, "exact_match": 0.5, "equal": 1, "answers": 2}
    assert exam_record(3, [])["exact_match"] == 0.0
