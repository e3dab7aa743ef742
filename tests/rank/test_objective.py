"""`lapilli train` with an objective: rows become the task of Python, results are checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lapilli
from lapilli import Chat
from lapilli.checkpoint.load import load_checkpoint
from lapilli.errors import ConfigError, DataError, UnknownKeyError
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker
from lapilli.rank.mixlm import RankingExample, RankingTask, with_teacher
from lapilli.rank.next_item import NextItemTask
from lapilli.rank.objective import build_objective
from lapilli.train.build import add_modalities
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import launch
from lapilli.train.next_event import NextEventTask
from lapilli.train.recipe.file import load_recipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import train
from tests.modality.declared import DECLARED, tiny_language_model

COLOURS = ("red", "green", "blue")
THINGS = ("a boat", "a large box", "the old house", "a star")
RECIPE = """
stage = "instruct"
model.checkpoint = "{checkpoint}"
model.tune_encoder = ["item", "user"]
data.sources = [{{path = "{rows}"}}]
optim.lr = 3e-3
run.steps = 4
run.batch_size = 4
run.log_every = 1
run.plot = false
[{objective}]
"""
RANKING = [
    {"query": query, "item": f"{thing}, {colour}", "label": float(colour == "red"), "teacher": 0.5}
    for query in ("good", "what I like", "best")
    for thing in THINGS
    for colour in COLOURS
]
ITEMS = [
    {"id": n, "text": f"{thing}, {colour}"} for n, thing in enumerate(THINGS) for colour in [0]
]
NEXT_ITEMS = [{"history": [0, 1, 2, "3"]}, {"history": [3, 2, 1]}, {"history": [1, 0]}] * 3
NEXT_EVENTS = [
    {"history": {"film": [1, 2, 3, n], "genre": [1, 2, 3, 4], "rating": [0.5, 1, 0, n / 4]}}
    for n in range(4, 10)
]
ROWS = {"ranking": RANKING, "next_item": NEXT_ITEMS, "next_event": NEXT_EVENTS}
LEARNS = {
    "ranking": {"language_model"},
    "next_item": {"language_model", "modalities"},
    "next_event": {"modalities"},
}
TASKS = {"ranking": RankingTask, "next_item": NextItemTask, "next_event": NextEventTask}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("objective")
    plain = tiny_language_model(root / "plain")
    declared = {name: DECLARED[name] for name in ("user", "item")}
    declared["item"] = {**declared["item"], "tokens": 1}
    add_modalities(str(plain), root / "start", declared)
    for name, rows in {**ROWS, "items": ITEMS}.items():
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def write(root: Path, objective: str, more: str = "", rows: Path | None = None) -> Path:
    keys = {"ranking": "", "next_event": "", "next_item": f'catalogue = "{root}/items.jsonl"'}
    text = RECIPE.format(
        checkpoint=root / "start", rows=rows or root / f"{objective}.jsonl", objective=objective
    )
    path = root / "recipe.toml"
    path.write_text(f"{text}{keys[objective]}\n{more}")
    return path


def log(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("objective", list(ROWS))
def test_a_run_is_saved_and_goes_on_to_the_same_losses(root, tmp_path, objective) -> None:
    file = write(root, objective)
    task = build_objective(load_recipe(file), SINGLE_PROCESS)
    assert isinstance(task.made, TASKS[objective])
    launch(load_recipe(file), tmp_path / "whole", parallel=SINGLE_PROCESS, build=build_objective)
    half = load_recipe(file, ["--run.steps", "2", "--optim.schedule", "constant"])
    whole = load_recipe(file, ["--optim.schedule", "constant"])
    for recipe in (half, whole):
        launch(recipe, tmp_path / "parts", parallel=SINGLE_PROCESS, build=build_objective)
    launch(whole, tmp_path / "once", parallel=SINGLE_PROCESS, build=build_objective)
    assert log(tmp_path / "parts") == log(tmp_path / "once")
    start = load_checkpoint(root / "start", device="cpu").model.state_dict()
    end = load_checkpoint(tmp_path / "whole" / "model", device="cpu").model.state_dict()
    changed = {name.split(".")[0] for name in end if not torch.equal(start[name], end[name])}
    assert changed == LEARNS[objective]
    card = (tmp_path / "whole" / "model" / "README.md").read_text()
    assert f"{task.num_samples}" in card


def test_losses_are_those_of_the_task_in_python(root, tmp_path) -> None:
    recipe = load_recipe(write(root, "ranking", 'reads = "mixed"'))
    launch(recipe, tmp_path / "recipe", parallel=SINGLE_PROCESS, build=build_objective)
    chat = Chat(load_checkpoint(root / "start", device="cpu", dtype="float32"))
    choose_trainable(chat.model, recipe)
    examples = [RankingExample(*row.values()) for row in RANKING]
    train(RankingTask(chat, examples, recipe.run, reads="mixed"), recipe, tmp_path / "python")
    assert log(tmp_path / "recipe") == log(tmp_path / "python")


def test_a_teacher_is_asked_before_the_run(root) -> None:
    asked = f'reads = "mixed"\nteacher = "{root / "start"}"\ncurriculum = [{{distill = 1}}]'
    task = build_objective(load_recipe(write(root, "ranking", asked)), SINGLE_PROCESS)
    assert len(task.made.curriculum) == 1
    plain = [RankingExample(*list(row.values())[:3]) for row in RANKING]
    ranker = Ranker(lapilli.load(str(root / "start"), device="cpu", dtype="float32"))
    assert task.made.examples == with_teacher(plain, ranker)


def test_the_result_ranks(root, tmp_path) -> None:
    recipe = load_recipe(write(root, "ranking", 'reads = "mixed"'))
    launch(recipe, tmp_path / "run", parallel=SINGLE_PROCESS, build=build_objective)
    ranker = Ranker(lapilli.load(str(tmp_path / "run" / "model"), device="cpu"))
    scores = ranker.score("good", [MediaPart("a star, red", "item"), "a star, red"])
    assert bool(((scores > 0) & (scores < 1)).all())


def test_a_query_is_held_out_with_all_of_its_rows(root) -> None:
    recipe = load_recipe(write(root, "ranking"), ["--data.held_out", "0.3"])
    task = build_objective(recipe, SINGLE_PROCESS)
    queries = [{one.query for one in made} for made in (task.held_out, task.made.examples)]
    assert [len(one) for one in queries] == [1, 2]
    assert not queries[0] & queries[1]
    assert task.evaluate()["eval_loss"] > 0
    other = ["--data.evaluation", f'[{{path = "{root}/ranking.jsonl"}}]']
    task = build_objective(load_recipe(write(root, "ranking"), other), SINGLE_PROCESS)
    assert len(task.held_out) == len(task.made.examples) == len(RANKING)


@pytest.mark.parametrize(
    ("objective", "row", "says"),
    [
        ("ranking", {"query": "a", "label": 1}, r"bad.jsonl:1 has no 'item': expected it beside"),
        ("ranking", {"query": "a", "item": " ", "label": 1}, "item is ' ': expected a text"),
        ("ranking", {"query": "a", "item": "b", "label": 2}, "label is 2: expected a probability"),
        ("ranking", {"query": "a", "item": "b", "label": True}, "label is True: expected a prob"),
        ("ranking", {"query": "a", "item": "b", "label": 1, "teacher": "x"}, "teacher is 'x'"),
        ("ranking", 5, "bad.jsonl:1 is 5: expected an object"),
        ("next_item", {"history": "0 1"}, "history is '0 1': expected a list of ids"),
        ("next_item", {"history": [0, 9]}, "9 is none of the 4 items of .*items.jsonl"),
        ("next_item", {"history": [0]}, "a history of 1 items has no next one"),
        ("next_event", {"user": {}}, "bad.jsonl:1 has no 'history': expected it beside 'user'"),
        ("next_event", {"history": {"film": [99, 1]}}, "bad.jsonl:1: user: film is 99"),
        ("next_event", {"history": {"film": [9]}}, "bad.jsonl:1: a history of one event has no"),
    ],
)
def test_rows_that_cannot_be_read(root, tmp_path, objective, row, says) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text(json.dumps(row))
    with pytest.raises(DataError, match=says):
        build_objective(load_recipe(write(root, objective, rows=rows)), SINGLE_PROCESS)


def test_recipes_that_nothing_can_be_done_with(root, tmp_path) -> None:
    file = write(root, "ranking")
    with pytest.raises(ConfigError, match=r"one objective, and the recipe has \[ranking\] and \[n"):
        load_recipe(file, ["--next_event.modality", "user"])
    with pytest.raises(UnknownKeyError, match=r"data.pack would change nothing: \[ranking\] does"):
        load_recipe(file, ["--data.pack", "true"])
    with pytest.raises(ConfigError, match="a phase starts at 2"):
        load_recipe(file, ["--ranking.curriculum", "[{start = 2}]"])
    with pytest.raises(ConfigError, match=r"recipe key data\.sources is empty: name a file"):
        build_objective(load_recipe(file, ["--data.sources", "[]"]), SINGLE_PROCESS)
    weighted = ["--data.sources", f'[{{path = "{root}/ranking.jsonl", weight = 2}}]']
    with pytest.raises(ConfigError, match=r"weighs .* with 2.0, and rows of \[ranking\] are each"):
        build_objective(load_recipe(file, weighted), SINGLE_PROCESS)
    with pytest.raises(ConfigError, match="the recipe has no objective: add"):
        build_objective(replace(load_recipe(file), ranking=None), SINGLE_PROCESS)
