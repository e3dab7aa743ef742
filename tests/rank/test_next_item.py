"""Next items: scores and loss are those of the plain computation, and a rule is learned."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli import Chat
from lapilli.checkpoint.load import load_checkpoint
from lapilli.errors import ConfigError, MediaError, PromptError, UnsupportedModelError
from lapilli.rank.next_item import NextItemScorer, NextItemTask
from lapilli.store import Store, StoreWriter
from lapilli.train.build import add_modalities
from lapilli.train.recipe import ModelRecipe, OptimRecipe, Recipe, RunRecipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import Task, TrainingError, evaluate, train
from tests.modality.declared import DECLARED, tiny_language_model
from tests.train.conftest import steps_of

TEXTS = tuple(
    f"{size} {thing}"
    for size in ("a small", "a large")
    for thing in ("boat", "red square", "old house", "box of tools", "star", "circle")
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("next")
    plain = tiny_language_model(root / "plain")
    declared = {
        "item": {**DECLARED["item"], "tokens": 1},
        "vec": {"kind": "vector", "width": 3},
        "pair": {"kind": "vector", "width": 3, "tokens": 2},
    }
    add_modalities(str(plain), root / "model", declared)
    return root / "model"


def load(checkpoint: Path) -> Chat:
    return Chat(load_checkpoint(checkpoint, device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def chat(checkpoint) -> Chat:
    return load(checkpoint)


def recipe(**run) -> Recipe:
    given = {"steps": 10, "batch_size": 8, "log_every": 1, "save_every": 99, "plot": False, **run}
    return Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=3e-3),
        run=RunRecipe(**given),
        model=ModelRecipe(tune_encoder=("item",)),
    )


def histories(count: int) -> list[list[int]]:
    """A thing is followed by the next one."""
    return [[(start + i) % 12 for i in range(2 + start % 5)] for start in range(count)]


def task(chat: Chat, asked: Recipe, **changes) -> NextItemTask:
    choose_trainable(chat.model, asked)
    given = {"catalogue": TEXTS, "histories": histories(24), "run": asked.run, **changes}
    return NextItemTask(chat=chat, **given)


@torch.inference_mode()
def alone(chat: Chat, name: str, catalogue, histories) -> torch.Tensor:
    """The plain loop: an item and a user at a time."""
    modality, model = chat.model.modality(name), chat.model.language_model
    vectors = torch.cat([modality.embed([modality.prepare(one)])[0] for one in catalogue])
    rows = []
    for history in histories:
        read = vectors[torch.tensor(history)][None]
        state = model.forward(read, position_ids=torch.arange(len(history))[None])[0, -1]
        rows.append([state @ v / (state.norm() * v.norm()) for v in vectors])
    return torch.tensor(rows)


@pytest.mark.parametrize("name", ["item", "vec"])
@given(st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=6), min_size=1, max_size=7))
@settings(max_examples=6)
def test_scores_are_the_plain_ones(chat, name, users):
    catalogue = (
        TEXTS if name == "item" else torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    )
    scorer = NextItemScorer(chat, name, batch_size=3)
    found = scorer.score(users, scorer.encode(catalogue))
    torch.testing.assert_close(found, alone(chat, name, catalogue, users), rtol=1e-4, atol=1e-4)


def test_items_of_a_store_and_the_last_ones_of_a_history(chat, tmp_path):
    scorer = NextItemScorer(chat, max_items=2)
    vectors = scorer.encode(TEXTS)
    with StoreWriter(
        tmp_path / "store", encoder="tiny", width=48, tokens=1, dtype="float32"
    ) as writer:
        writer.add(list(map(str, range(12))), vectors[:, None], list(TEXTS))
    stored = Store(tmp_path / "store").get(list(map(str, range(12))))
    assert stored.shape == (12, 1, 48)
    users = [[1, 2, 3], [2, 3]]
    found = scorer.score(users, stored)
    torch.testing.assert_close(found, scorer.score(users, vectors))
    torch.testing.assert_close(found[0], found[1])
    assert scorer.score([], vectors).shape == (0, 12)


def test_the_loss_is_the_plain_one(chat):
    made = task(chat, recipe(), temperature=0.2, negatives=3)
    batch, count = made.batch(2, 0)
    found = made.loss(batch)
    modality = chat.model.modality("item")
    with torch.no_grad():
        vectors = torch.cat([modality.embed([one])[0] for one in batch.items])
        total, number = 0.0, 0
        for history in batch.histories:
            read = vectors[torch.tensor(history[:-1])][None]
            positions = torch.arange(read.shape[1])[None]
            states = chat.model.language_model.forward(read, position_ids=positions)[0]
            for state, target in zip(states, history[1:], strict=True):
                scores = torch.cosine_similarity(state[None], vectors) / 0.2
                total += float(scores.logsumexp(0) - scores[target])
                number += 1
    assert count == number
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-4)
    assert 0 <= float(found.parts["right"]) <= count
    found.total.backward()
    encoder = modality.encoder
    assert all(float(p.grad.abs().sum()) > 0 for p in encoder.parameters())
    chat.model.zero_grad()


def test_drawn_items_are_a_function_of_the_step(chat):
    few = [[0, 1], [1, 0]]
    made = task(chat, recipe(), histories=few, negatives=4)
    assert len(task(chat, recipe(), histories=few).batch(0, 0)[0].items) == 2
    first, again, other = (made.batch(step, 0)[0].items for step in (0, 0, 1))
    assert len(first) > 2
    ids = [[item.ids.tolist() for item in items] for items in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_long_histories_are_learned_in_pieces(chat):
    long = list(range(11))
    made = task(chat, recipe(batch_size=1), histories=[long], max_items=4)
    assert made.num_samples == 3
    seen = []
    for step in range(3):
        batch, _ = made.batch(step, 0)
        assert batch.ids == ("history 0",)
        seen.append([batch.items[at].ids.tolist() for at in batch.histories[0]])
    found = sorted(len(piece) for piece in seen)
    assert found == [3, 5, 5]
    following = [one for piece in seen for one in piece[1:]]
    prepare = chat.model.modality("item").prepare
    assert sorted(following) == sorted(prepare(TEXTS[one]).ids.tolist() for one in long[1:])


@pytest.mark.slow
def test_what_follows_is_learned(checkpoint, tmp_path):
    chat, asked = load(checkpoint), recipe(steps=30, gradient_accumulation_steps=2)
    made = task(chat, asked, held_out=[[3, 4, 5], [10, 11, 0], [7, 8]])
    assert isinstance(made, Task)
    before = evaluate(made, asked)
    train(made, asked, tmp_path)
    after = evaluate(made, asked)
    assert after["eval_loss"] < 0.3 * before["eval_loss"]
    assert after["eval_recall"] == 1.0
    scorer = NextItemScorer(chat)
    assert scorer.score([[4, 5]], scorer.encode(TEXTS)).argmax() == 6
    records = steps_of(tmp_path)
    assert records[-1]["right"] > records[0]["right"]


@pytest.mark.slow
def test_a_run_in_two_parts_makes_the_same_bits(checkpoint, tmp_path):
    asked = recipe(steps=4, save_every=1, gradient_accumulation_steps=2, batch_size=3)
    whole, stopped, again = (task(load(checkpoint), asked, negatives=2) for _ in range(3))
    train(whole, asked, tmp_path / "whole")
    draw = stopped.batch
    stopped.batch = lambda step, micro: draw(step, micro) if step < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(stopped, asked, tmp_path / "parts")
    train(again, asked, tmp_path / "parts")
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    other = task(load(checkpoint), asked, negatives=3)
    with pytest.raises(TrainingError, match="negatives"):
        train(other, asked, tmp_path / "parts")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"catalogue": []}, ConfigError, "0 items and 24 histories: expected at least one of each"),
        ({"histories": []}, ConfigError, "12 items and 0 histories"),
        ({"histories": [[1]]}, PromptError, "history 0 has 1 items, expected at least 2"),
        ({"histories": [[1, 12]]}, PromptError, "history 0 has the item 12: the catalogue has"),
        ({"held_out": [[1, -1]]}, PromptError, "held-out history 0 has the item -1"),
        ({"temperature": 0.0}, ConfigError, r"temperature 0\.0: expected"),
        ({"max_items": 0}, ConfigError, "max_items is 0"),
        (
            {"held_out": [[1, 2]], "run": RunRecipe(batch_size=2, sharding="fsdp")},
            ConfigError,
            'run.sharding is "fsdp": leave held_out out',
        ),
        ({"modality": "user"}, UnsupportedModelError, "no modality 'user'"),
    ],
)
def test_one_clear_error(chat, changes, error, match):
    with pytest.raises(error, match=match):
        task(chat, recipe(), **changes)


def test_an_item_of_two_positions(chat):
    made = task(chat, recipe(), catalogue=torch.randn(12, 3), modality="pair")
    with pytest.raises(ConfigError, match="an item of the modality 'pair' has 2 positions"):
        made.loss(made.batch(0, 0)[0])
    with pytest.raises(ConfigError, match="declare tokens = 1"):
        NextItemScorer(chat, "pair").encode([[1.0, 2.0, 3.0]])


def test_what_cannot_be_scored(chat):
    scorer = NextItemScorer(chat)
    with pytest.raises(MediaError, match="item: the catalogue is empty"):
        scorer.encode([])
    with pytest.raises(MediaError, match=r"expected vectors \[N, 48\] or \[N, 1, 48\]"):
        scorer.score([[0]], torch.randn(3, 47))
    with pytest.raises(PromptError, match="history 1 has 0 items, expected at least 1"):
        scorer.score([[0], []], torch.randn(3, 48))
    with pytest.raises(PromptError, match="history 0 has the item 3"):
        scorer.score([[3]], torch.randn(3, 48))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        NextItemScorer(chat, batch_size=0)
